// Runs one JavaScript client of the metadata service, by its name, with the defaults of its library.
//
// Prints `ready VERSION` once the library is loaded, waits for a line, asks the metadata service, and prints
// `ok` or `failed ERROR`.

const readline = require("node:readline");

const version = (name) => require(`${process.env.NODE_PATH}/${name}/package.json`).version;
const SCOPE = "https://management.azure.com/.default";

const clients = {
  aws() {
    const { fromInstanceMetadata } = require("@aws-sdk/credential-providers");
    return [version("@aws-sdk/credential-providers"), fromInstanceMetadata()];
  },
  azure_managed_identity() {
    const { ManagedIdentityCredential } = require("@azure/identity");
    const credential = new ManagedIdentityCredential();
    return [version("@azure/identity"), () => credential.getToken(SCOPE)];
  },
  azure_default() {
    const { DefaultAzureCredential } = require("@azure/identity");
    const credential = new DefaultAzureCredential();
    return [version("@azure/identity"), () => credential.getToken(SCOPE)];
  },
  gcp_available() {
    const { isAvailable } = require("gcp-metadata");
    return [version("gcp-metadata"), isAvailable];
  },
  gcp_token() {
    const { instance } = require("gcp-metadata");
    return [version("gcp-metadata"), () => instance("service-accounts/default/token")];
  },
};

const [loaded, ask] = clients[process.argv.at(-1)]();
const say = (line) => process.stdout.write(`${line}\n`, () => process.exit());

console.log(`ready ${loaded}`);
readline.createInterface({ input: process.stdin }).once("line", () => {
  ask().then(
    (found) => say(found ? "ok" : "failed nothing"),
    (error) => say(`failed ${error.name} ${error.code ?? ""}`.trim()),
  );
});
