"""Renders the Kubernetes manifests in deploy and validates them against the schemas of the API.

Arguments: the workspace, the agent's binary, the packed chart, and `--write` to write the chart's README. `cargo xtask manifests` runs the script with its libraries in PYTHONPATH.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

import helm_python
import kubernetes_validate
import yaml

# No bytecode in the workspace.
sys.dont_write_bytecode = True
sys.path.append(f"{sys.argv[1]}/xtask")
from policies import check_policies, failures  # noqa: E402

ROOT, AGENT, PACKAGE = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
WRITE = "--write" in sys.argv
KUBERNETES, CHART = ROOT / "deploy/kubernetes", ROOT / "deploy/helm/imds-agent"
# The oldest version that the admission policy supports, and the newest version of the schemas.
VERSIONS = ["1.31", kubernetes_validate.latest_version()]
# Kinds of the Prometheus operator, which have no schema in Kubernetes.
FOREIGN = {"PodMonitor", "PrometheusRule", "SecurityContextConstraints", "ServiceMonitor"}


def check(what, text, kinds):
    documents = [document for document in yaml.safe_load_all(text) if document]
    if what.startswith(("base", "overlay", "chart with its")) and tomllib.loads(configuration(documents))["mode"] != "audit":
        failures.append(f"{what}: the first mode is not audit")
    found = {document["kind"] for document in documents}
    if not kinds <= found:
        failures.append(f"{what}: missing {', '.join(sorted(kinds - found))}")
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        for version in VERSIONS if kind not in FOREIGN else []:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                failures.append(f"{what}: {kind} {name} ({version}): {error}")
        if "imds.toml" in document.get("data", {}):
            check_config(f"{what}: {kind} {name}", document["data"]["imds.toml"])
    print(f"{what}: {', '.join(sorted(found))}")
    return documents


def config_errors(text):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        checked = subprocess.run([AGENT, "config", "check", file.name], capture_output=True, text=True)
    return checked.stderr.strip() if checked.returncode != 0 else None


def check_config(what, text):
    if errors := config_errors(text):
        failures.append(f"{what}: {errors}")


def check_values(what, values, documents):
    """Checks that values of the chart reach the configuration."""
    config = tomllib.loads(configuration(documents))
    measures = values.get("metrics", {}).get("programRunTime", False)
    if config["metrics"]["program_run_time"] != measures:
        failures.append(f"{what}: metrics.program_run_time is not {measures}")
    for path, value in leaves(values.get("config", {})):
        found = config
        for key in path:
            found = found.get(key, {})
        # Rules of extraConfig follow those of config.
        found = found[: len(value)] if isinstance(value, list) else found
        if found != value or type(found) is not type(value):
            failures.append(f"{what}: {'.'.join(path)} is {found} instead of {value}")


def leaves(table, path=()):
    """Returns the paths and values of a nested table."""
    for key, value in table.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def configuration(documents):
    return next(text for document in documents if (text := document.get("data", {}).get("imds.toml")))


def check_job(what, values, documents):
    """Checks that the hook checks the configuration of the release, unless the values turn it off."""
    jobs = [document for document in documents if document["kind"] == "Job"]
    if len(jobs) != (values.get("configCheck", {}).get("enabled", True) and not values.get("unload", False)):
        failures.append(f"{what}: {len(jobs)} Jobs")
    configs = {document["metadata"]["name"]: document for document in documents if document["kind"] == "ConfigMap"}
    agents = one(documents, "DaemonSet")["spec"]["template"]["spec"]

    def config(pod):
        volume = next(volume["configMap"] for volume in pod["volumes"] if volume["name"] == "config")
        return configs[volume["name"]]

    for job in jobs:
        pod = job["spec"]["template"]["spec"]
        container, copy = pod["containers"][0], config(pod)
        if container["args"][:2] != ["config", "check"] or container["image"] != agents["containers"][0]["image"]:
            failures.append(f"{what}: the Job does not run `config check` of the agent")
        if copy["data"] != config(agents)["data"]:
            failures.append(f"{what}: the Job checks another configuration")
        for document in (job, copy):
            hooks = document["metadata"]["annotations"]["helm.sh/hook"].split(",")
            if not {"pre-install", "pre-upgrade"} <= set(hooks):
                failures.append(f"{what}: {document['kind']} {document['metadata']['name']} is created at {hooks}")


def check_nodes(what, pod):
    """Checks the nodes on which the agent runs, by their labels."""
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]

    def holds(expression, labels):
        if expression["operator"] == "NotIn":
            return labels.get(expression["key"]) not in expression["values"]
        return expression["operator"] == "DoesNotExist" and expression["key"] not in labels

    for expected, labels in [
        (True, {"kubernetes.io/os": "linux"}),
        (True, {"type": "worker", "eks.amazonaws.com/compute-type": "ec2"}),
        (False, {"type": "virtual-kubelet"}),
        (False, {"virtual-kubelet.io/provider": "azure"}),
        (False, {"eks.amazonaws.com/compute-type": "fargate"}),
    ]:
        if all(holds(expression, labels) for expression in term["matchExpressions"]) != expected:
            failures.append(f"{what}: the agent {'does not run' if expected else 'runs'} on a node with {labels}")


def check_image_edit():
    """Checks that `kustomize edit set image`, as documented, has an effect in each overlay."""
    name, tag = "registry.example.com/imds-agent", "9"
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(KUBERNETES, pathlib.Path(directory) / "kubernetes")
        for overlay in sorted((copy / "overlays").iterdir()):
            path = overlay / "kustomization.yaml"
            edited = yaml.safe_load(path.read_text())
            edited["images"] = [{"name": "imds-agent", "newName": name, "newTag": tag}]
            path.write_text(yaml.safe_dump(edited))
            documents = [document for document in yaml.safe_load_all(kustomize(overlay)) if document]
            image = one(documents, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]["image"]
            if image != f"{name}:{tag}":
                failures.append(f"overlay {overlay.name}: the image stays {image}")
    print("the image of each overlay can be set")


def kustomize(path):
    return subprocess.run(["kubectl", "kustomize", path], check=True, capture_output=True, text=True).stdout


def rights(documents, resource):
    rules = one(documents, "ClusterRole")["rules"]
    return [rule["verbs"] for rule in rules if resource in rule["resources"]]


def check_checks(document):
    """Checks that the validation detects an unknown key."""
    document["spec"]["template"]["spec"]["hostPid"] = True
    try:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        failures.append("the validation accepts an unknown key")
    except kubernetes_validate.ValidationError:
        pass


def values_table():
    """Returns the README of the chart, with a row for each value of values.yaml that a comment `# -- …` describes."""
    rows, keys, comment = [], [], []
    lines = (CHART / "values.yaml").read_text().splitlines()
    defaults = yaml.safe_load("\n".join(lines))
    for line in lines:
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text.removeprefix("# -- ")]
        elif text.startswith("# ") and comment:
            comment.append(text.removeprefix("# "))
        elif ":" in text and not text.startswith(("#", "-")):
            keys = keys[: (len(line) - len(line.lstrip())) // 2] + [text.split(":")[0]]
            if comment:
                value = defaults
                for key in keys:
                    value = value[key]
                rows.append((".".join(keys), json.dumps(value, ensure_ascii=False), " ".join(comment)))
            comment = []
    table = "\n".join(f"| `{key}` | `{value}` | {text.replace('|', chr(92) + '|')} |" for key, value, text in rows)
    return README.format(table=table)


README = """# Helm chart of imds-agent

Blocks pods from the cloud instance metadata service with eBPF. [Installation on a cluster](../../../docs/install-kubernetes.md) describes the installation
and the rights of the pods; `ci` has example values.

`cargo xtask manifests --write` writes this file from `values.yaml`.

## Values

| key | default | description |
| --- | --- | --- |
{table}
"""


def one(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


path = CHART / "README.md"
if WRITE:
    path.write_text(values_table())
elif not path.exists() or path.read_text() != values_table():
    failures.append(f"{path}: differs from values.yaml; run `cargo xtask manifests --write`")

BASE = {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet"}
base = check("base", kustomize(KUBERNETES / "base"), BASE)
for overlay in sorted((KUBERNETES / "overlays").iterdir()):
    documents = check(f"overlay {overlay.name}", kustomize(overlay), BASE)
    # The command unload sets the condition of nodes to False.
    expected = [["get", "patch"]] if overlay.name == "unload" else []
    if rights(documents, "nodes/status") != expected:
        failures.append(f"overlay {overlay.name}: the role has other rights to the status of nodes than {expected}")
with tempfile.TemporaryDirectory(dir=KUBERNETES) as directory:
    # Kustomize reads files outside of its directory only as resources or components.
    components = sorted(path.name for path in (KUBERNETES / "components").iterdir())
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": [f"../components/{name}" for name in components],
    }
    (pathlib.Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    kinds = BASE | {"PodMonitor", "PrometheusRule", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    everything = check(f"components {', '.join(components)}", kustomize(directory), kinds)
    check_policies(
        "kustomize",
        everything,
        "imds-agent/exempt",
        lambda user: [user("kubernetes-admin"), user("a", "system:masters"), user("a", "kubeadm:cluster-admins")],
    )
    if rights(everything, "namespaces") != [["list", "watch"]]:
        failures.append("kustomize: the role has other rights to namespaces than the agent uses")

check_image_edit()

# Further values of the chart.
VARIANTS = {
    "no check": {"configCheck": {"enabled": False}},
    "namespaces watched": {"kubernetes": {"watchNamespaces": True}},
}
CHART_KINDS = {"ServiceAccount", "ConfigMap", "DaemonSet"}
with helm_python.Chart.load(str(CHART)) as chart:

    def render(values, name="imds-agent"):
        rendered = chart.render(values, name=name, namespace="imds-agent")
        return "\n---\n".join(text for name, text in sorted(rendered.items()) if name.endswith(".yaml"))

    examples = {path.name: yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*-values.yaml"))}
    default = None
    for name, values in {"its defaults": {}, **examples, **VARIANTS}.items():
        what = f"chart with {name}"
        has_account = values.get("serviceAccount", {}).get("create", True)
        documents = check(what, render(values), CHART_KINDS - (set() if has_account else {"ServiceAccount"}))
        default = default or documents
        check_values(what, values, documents)
        check_job(what, values, documents)
        if values.get("admissionPolicy", {}).get("enabled", False):
            labels = {"keys": ["imds-agent/exempt"], "users": [], "groups": ["system:masters", "kubeadm:cluster-admins"]}
            labels |= values["admissionPolicy"].get("namespaceLabels", {})

            def administrators(user, labels=labels):
                return [user(name) for name in labels["users"]] + [user("a", name) for name in labels["groups"]]

            for label in labels["keys"]:
                check_policies(what, documents, label, administrators)
        if any(document["kind"] == "ClusterRole" for document in documents):
            watches = "namespace_selector" in configuration(documents)
            watches = watches or values.get("kubernetes", {}).get("watchNamespaces", False)
            if rights(documents, "namespaces") != ([["list", "watch"]] if watches else []):
                failures.append(f"{what}: the role has other rights to namespaces than the agent uses")
    pools = yaml.safe_load_all(render({"extraConfig": "[[node_pool]]\nname = 'a'\nnode_selector.match_labels = { a = 'b' }"}))
    if rights([document for document in pools if document], "nodes") != [["get"]]:
        failures.append("chart: the role has other rights to nodes than a pool of extraConfig uses")
    for document in [document for document in yaml.safe_load_all(render({}, "r" * 53)) if document]:
        # The limit of names that become values of labels.
        if document["kind"] in {"DaemonSet", "Job", "Service"} and len(document["metadata"]["name"]) > 63:
            failures.append(f"chart: the name of the {document['kind']} is too long: {document['metadata']['name']}")
    broken = [document for document in yaml.safe_load_all(render({"extraConfig": "typo = true"})) if document]
    if not config_errors(configuration(broken)):
        failures.append("chart: the hook accepts an unknown key")
    with helm_python.Chart.load(PACKAGE) as packed:
        if [packed.render({}, name="a", namespace="b"), packed.metadata] != [
            chart.render({}, name="a", namespace="b"), chart.metadata
        ]:
            failures.append("chart: the package differs from the directory")
    # The schema of the values, or a template, must reject each of these.
    for wrong in [
        {"config": {"mode": "audti"}},
        {"config": {"exempt": [{"name": "a", "namespaces": "b"}]}},
        {"serviceMonitor": {"enabled": True}},
        {"confg": {}},
        {"podMonitor": {"enabled": True}},
        {"metrics": {"programRunTime": "yes"}},
        {"admissionPolicy": {"namespaceLabels": {"keys": ["a b"]}}},
        *[
            {"config": {"exempt": [{"name": "a", "namespace_selector": selector}]}, "admissionPolicy": {"enabled": True} | more}
            for selector in [
                {"match_labels": {"team": "x"}},
                {"match_expressions": [{"key": "team", "operator": "Exists"}]},
            ]
            for more in [{}, {"namespaceLabels": {"keys": []}}]
        ],
        {"serviceAccount": {"create": False}},
        {"appArmorProfile": {"type": "Localhost"}},
    ]:
        try:
            chart.render(wrong, name="imds-agent", namespace="imds-agent")
            failures.append(f"chart: {wrong} is not rejected")
        except helm_python.HelmError as error:
            print(f"chart: {wrong} is rejected: {str(error).splitlines()[-1]}")

# The chart and the base must create the same pods.
pods = [one(documents, "DaemonSet")["spec"]["template"]["spec"] for documents in (base, default)]
check_nodes("base", pods[0])
# An overlay sets the image, and a value of the chart does.
containers = [pod["containers"][0] for pod in pods]
images = [container.pop("image") for container in containers]
if images[1] != f"localhost/{images[0]}":
    failures.append(f"the images differ: {images}")
if pods[0] != pods[1]:
    failures.append(f"the chart's pods differ from those of the base:\n{yaml.safe_dump(pods[0])}\n{yaml.safe_dump(pods[1])}")
for what, documents in [("base", base), ("chart", default)]:
    rules = one(documents, "ClusterRole")["rules"]
    if rules != [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]:
        failures.append(f"{what}: the role has other rights than the agent uses: {rules}")

check_checks(one(check("base", kustomize(KUBERNETES / "base"), BASE), "DaemonSet"))
print(*failures, sep="\n", file=sys.stderr)
sys.exit(bool(failures))
