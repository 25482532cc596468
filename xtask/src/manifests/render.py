"""Renders everything in deploy for Kubernetes and validates it against the API's own schemas.

Arguments: the workspace, the agent's binary. `cargo xtask manifests` runs it where its two libraries are.
"""

import pathlib
import subprocess
import sys
import tempfile

import helm_python
import kubernetes_validate
import yaml

ROOT, AGENT = pathlib.Path(sys.argv[1]), sys.argv[2]
KUBERNETES, CHART = ROOT / "deploy/kubernetes", ROOT / "deploy/helm/imds-agent"
# The oldest that the admission policy is for, and the newest that the schemas are of.
VERSIONS = ["1.31", kubernetes_validate.latest_version()]
# Of the Prometheus operator, which are no part of Kubernetes.
FOREIGN = {"PodMonitor", "PrometheusRule"}
failures = []


def check(what, text, kinds):
    documents = [document for document in yaml.safe_load_all(text) if document]
    found = {document["kind"] for document in documents}
    if not kinds <= found:
        failures.append(f"{what}: there is no {', '.join(sorted(kinds - found))}")
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        for version in VERSIONS if kind not in FOREIGN else []:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                failures.append(f"{what}: {kind} {name} ({version}): {error}")
        if kind == "ConfigMap":
            check_config(f"{what}: {kind} {name}", document["data"]["imds.toml"])
    print(f"{what}: {', '.join(sorted(found))}")
    return documents


def check_config(what, text):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        checked = subprocess.run([AGENT, "config", "check", file.name], capture_output=True, text=True)
    if checked.returncode != 0:
        failures.append(f"{what}: {checked.stderr.strip()}")


def kustomize(path):
    return subprocess.run(["kubectl", "kustomize", path], check=True, capture_output=True, text=True).stdout


def check_checks(document):
    """What would be wrong has to be found."""
    document["spec"]["template"]["spec"]["hostPid"] = True
    try:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        failures.append("a key that Kubernetes does not know is not found")
    except kubernetes_validate.ValidationError:
        pass


def one(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


BASE = {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet"}
base = check("base", kustomize(KUBERNETES / "base"), BASE)
for overlay in sorted((KUBERNETES / "overlays").iterdir()):
    check(f"overlay {overlay.name}", kustomize(overlay), BASE)
with tempfile.TemporaryDirectory(dir=KUBERNETES) as directory:
    # Kustomize follows no path out of the directory that it is given, unless that is a resource or a component.
    components = sorted(path.name for path in (KUBERNETES / "components").iterdir())
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": [f"../components/{name}" for name in components],
    }
    (pathlib.Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    kinds = BASE | FOREIGN | {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    check(f"components {', '.join(components)}", kustomize(directory), kinds)

CHART_KINDS = {"ServiceAccount", "ConfigMap", "DaemonSet"}
with helm_python.Chart.load(str(CHART)) as chart:
    default = None
    for path in [None, *sorted((CHART / "ci").glob("*-values.yaml"))]:
        values = yaml.safe_load(path.read_text()) if path else {}
        rendered = chart.render(values, name="imds-agent", namespace="imds-agent")
        manifests = [text for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
        documents = check(f"chart with {path.name if path else 'its defaults'}", "\n---\n".join(manifests), CHART_KINDS)
        default = default or documents
    # What the schema of the values is for.
    for wrong in [{"config": {"mode": "audti"}}, {"confg": {}}, {"podMonitor": {"enabled": True}}]:
        try:
            chart.render(wrong, name="imds-agent", namespace="imds-agent")
            failures.append(f"chart: {wrong} is not refused")
        except helm_python.HelmError as error:
            print(f"chart: {wrong} is refused: {str(error).splitlines()[-1]}")

# Two ways to the same pods.
pods = [one(documents, "DaemonSet")["spec"]["template"]["spec"] for documents in (base, default)]
if pods[0] != pods[1]:
    failures.append(f"the chart's pods are not those of the base:\n{yaml.safe_dump(pods[0])}\n{yaml.safe_dump(pods[1])}")
if one(base, "ClusterRole")["rules"] != one(default, "ClusterRole")["rules"]:
    failures.append("the chart's role is not that of the base")

check_checks(one(check("base", kustomize(KUBERNETES / "base"), BASE), "DaemonSet"))
print(*failures, sep="\n", file=sys.stderr)
sys.exit(bool(failures))
