"""Evaluates the admission policies in deploy on objects with a CEL engine. `render.py` imports the module."""

import ipaddress

from cel_expr_python import cel
from cel_expr_python.ext import ext_optional

failures = []


def is_ip(text):
    """Implements isIP of Kubernetes' CEL library, which accepts neither zones nor IPv4-mapped addresses."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text and getattr(address, "ipv4_mapped", None) is None


def function(name, overload, result, implementation):
    overloads = [cel.Overload(overload, result, [cel.Type.STRING], False, implementation)]
    return cel.FunctionDecl(name, overloads)


# Represents addresses as canonical text, so that equal addresses compare equal.
IP_LIBRARY = cel.CelExtension(
    "ip",
    [
        function("isIP", "is_ip_string", cel.Type.BOOL, is_ip),
        function("ip", "string_to_ip", cel.Type.STRING, lambda text: str(ipaddress.ip_address(text))),
    ],
)


def admits(policy, thing, before=None, request=None):
    """Returns whether a policy admits an object instead of the one before. The CEL implementation is another one than Kubernetes'."""
    types = dict.fromkeys(["object", "oldObject", "request", "variables"], cel.Type.DYN)
    env = cel.NewEnv(variables=types, extensions=[IP_LIBRARY, ext_optional.ExtOptional()])

    def evaluate(expression):
        data = {"object": thing, "oldObject": before, "request": request or {}, "variables": variables}
        value = env.compile(expression).eval(data=data)
        if value.type() == cel.Type.ERROR:
            raise ValueError(f"{expression}: {value.value()}")
        return value.plain_value()

    variables = {}
    if not all(evaluate(condition["expression"]) for condition in policy["spec"].get("matchConditions", [])):
        return True
    for variable in policy["spec"]["variables"]:
        variables[variable["name"]] = evaluate(variable["expression"])
    return all(evaluate(validation["expression"]) for validation in policy["spec"]["validations"])


def check_policy(what, policy):
    """Evaluates the policy on Services, EndpointSlices and Endpoints with pod and metadata addresses."""

    def service(**spec):
        return {"kind": "Service", "spec": {"type": "ClusterIP", "clusterIP": "10.0.0.1", **spec}}

    def of_slice(kind, *addresses):
        return {"kind": "EndpointSlice", "addressType": kind, "endpoints": [{"addresses": list(addresses)}]}

    def of_endpoints(state, *addresses):
        return {"kind": "Endpoints", "subsets": [{state: [{"ip": address} for address in addresses]}]}

    def with_status(*ingress):
        return service(type="LoadBalancer") | {"status": {"loadBalancer": {"ingress": list(ingress)}}}

    matched = {name for rule in policy["spec"]["matchConstraints"]["resourceRules"] for name in rule["resources"]}
    if missing := {"services", "services/status", "endpoints", "endpointslices"} - matched:
        failures.append(f"{what}: the policy does not see {missing}")
    cases = [
        (True, service()),
        (True, service() | {"status": {"loadBalancer": {}}}),
        (True, with_status({"ip": "192.0.2.3", "ipMode": "VIP"}, {"hostname": "lb.example.com"})),
        (False, with_status({"hostname": "lb.example.com"}, {"ip": "168.63.129.16"})),
        (False, with_status({"ip": "169.254.169.254"})),
        (True, service(externalIPs=["192.0.2.1"], loadBalancerIP="192.0.2.2")),
        (True, service(type="ExternalName", externalName="example.com")),
        (True, of_slice("IPv4", "10.244.0.7", "10.244.0.8")),
        (True, of_slice("FQDN", "example.com")),
        (True, {"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": []}),
        (True, {"kind": "EndpointSlice", "addressType": "IPv4"}),
        (True, of_endpoints("addresses", "10.244.0.7")),
        (True, {"kind": "Endpoints"}),
        (False, service(externalIPs=["192.0.2.1", "169.254.169.254"])),
        (False, service(loadBalancerIP="168.63.129.16")),
        (False, of_slice("IPv4", "10.244.0.7", "169.254.169.254")),
        (False, of_slice("IPv6", "fd00:0ec2:0::254")),
        (False, of_slice("IPv6", "::ffff:169.254.169.254")),
        (False, of_endpoints("addresses", "100.100.100.200")),
        (False, of_endpoints("notReadyAddresses", "169.254.169.254")),
    ]
    for expected, thing in cases:
        try:
            if admits(policy, thing) != expected:
                failures.append(f"{what}: the policy {'refuses' if expected else 'admits'} {thing}")
        except Exception as error:
            failures.append(f"{what}: the policy fails on {thing}: {error}")
    print(f"{what}: the policy admits and refuses {len(cases)} objects as expected")


def check_label_policy(what, policy, label, administrators):
    """Evaluates the policy on changes of namespaces by tenants and administrators."""

    def namespace(**labels):
        labels = {label if key == "granted" else key: value for key, value in labels.items()}
        return {"kind": "Namespace", "metadata": {"name": "a", "labels": labels}}

    def user(name, *groups):
        return {"username": name, "groups": [*groups, "system:authenticated"]}

    bare = {"kind": "Namespace", "metadata": {"name": "a"}}
    tenant = user("tenant", "tenants", "system:serviceaccounts")
    anonymous = {"username": "tenant"}
    matched = {name for rule in policy["spec"]["matchConstraints"]["resourceRules"] for name in rule["resources"]}
    if missing := {"namespaces", "namespaces/status", "namespaces/finalize"} - matched:
        failures.append(f"{what}: the policy does not see {missing}")
    changes = [
        (None, namespace(granted="true")),
        (None, namespace(granted="")),
        (bare, namespace(granted="true")),
        (namespace(team="x"), namespace(team="x", granted="true")),
        (namespace(granted="true"), namespace(granted="false")),
        (namespace(granted="true"), namespace(granted="")),
        (namespace(granted="true"), namespace(team="x")),
        (namespace(granted=""), bare),
    ]
    others = [
        (None, bare),
        (None, namespace(team="x")),
        (bare, namespace(team="x")),
        (namespace(granted="true"), namespace(granted="true", team="x")),
        (namespace(granted="true", team="x"), namespace(granted="true")),
        (namespace(team="x"), bare),
    ]
    cases = [(False, by, change) for by in (tenant, anonymous) for change in changes]
    cases += [(True, by, change) for by in administrators(user) for change in changes]
    cases += [(True, by, change) for by in (tenant, anonymous) for change in others]
    for expected, by, (before, after) in cases:
        request = {"operation": "UPDATE" if before else "CREATE", "userInfo": by}
        case = f"{by} to change {before} to {after}"
        try:
            if admits(policy, after, before, request) != expected:
                failures.append(f"{what}: the policy {'forbids' if expected else 'allows'} {case}")
        except Exception as error:
            failures.append(f"{what}: the policy fails on {case}: {error}")
    print(f"{what}: the policy allows and forbids {len(cases)} changes of labels as expected")


def check_write_policy(what, policy, account):
    """Evaluates the policy on writes of the agents of two nodes, and of another client."""
    matched = {name for rule in policy["spec"]["matchConstraints"]["resourceRules"] for name in rule["resources"]}
    if missing := {"events", "nodes", "nodes/status"} - matched:
        failures.append(f"{what}: the policy does not see {missing}")

    def agent(node):
        return {"username": account, "extra": {"authentication.kubernetes.io/node-name": [node]}}

    def event(**fields):
        fields = {"reportingController": "imds-agent", "reportingInstance": "a", "reason": "MetadataAccessDenied"} | fields
        return "events", "pod.1", {"kind": "Event", **fields}

    def node(name):
        return "nodes", name, {"kind": "Node"}

    cases = [
        (True, agent("a"), node("a")),
        (False, agent("a"), node("b")),
        (False, {"username": account}, node("a")),
        (True, {"username": "system:node:b"}, node("b")),
        (True, agent("a"), event()),
        (False, agent("b"), event()),
        (False, agent("a"), event(reportingController="kubelet")),
        (False, agent("a"), event(reason="Failed")),
        (True, {"username": "system:node:b"}, event(reportingController="kubelet", reason="Failed")),
    ]
    for expected, by, (resource, name, thing) in cases:
        request = {"userInfo": by, "resource": {"resource": resource}, "name": name}
        try:
            if admits(policy, thing, None, request) != expected:
                failures.append(f"{what}: the policy {'forbids' if expected else 'allows'} {by} to write {thing}")
        except Exception as error:
            failures.append(f"{what}: the policy fails on {by} and {thing}: {error}")
    print(f"{what}: the policy allows and forbids {len(cases)} writes of agents as expected")


def policy(documents, name):
    policies = (document for document in documents if document["kind"] == "ValidatingAdmissionPolicy")
    return next((policy for policy in policies if policy["metadata"]["name"].endswith(f"-{name}")), None)


def check_policies(what, documents, label, administrators):
    check_policy(what, policy(documents, "services"))
    check_label_policy(what, policy(documents, "namespaces"), label, administrators)
    account = next(document for document in documents if document["kind"] == "DaemonSet")
    account = account["spec"]["template"]["spec"]["serviceAccountName"]
    check_write_policy(what, policy(documents, "writes"), f"system:serviceaccount:imds-agent:{account}")
    names = [document["metadata"]["name"] for document in documents if document["kind"] == "ValidatingAdmissionPolicy"]
    bound = [
        document["spec"]["policyName"]
        for document in documents
        if document["kind"] == "ValidatingAdmissionPolicyBinding" and document["spec"]["validationActions"] == ["Deny"]
    ]
    if sorted(names) != sorted(bound):
        failures.append(f"{what}: the policies {names} are bound as {bound}")
