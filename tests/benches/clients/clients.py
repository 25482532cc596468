"""Runs one Python client of the metadata service, by its name, with the defaults of its library.

Prints `ready VERSION` once the library is loaded, waits for a line, asks the metadata service, and prints
`ok` or `failed ERROR`.
"""

import importlib.metadata
import sys


def boto3():
    import boto3

    session = boto3.Session()
    yield importlib.metadata.version("boto3")
    # None if no provider of the chain has credentials.
    yield session.get_credentials() is not None


def azure_managed_identity():
    from azure.identity import ManagedIdentityCredential

    credential = ManagedIdentityCredential()
    yield importlib.metadata.version("azure-identity")
    yield credential.get_token("https://management.azure.com/.default")


def azure_default():
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential()
    yield importlib.metadata.version("azure-identity")
    yield credential.get_token("https://management.azure.com/.default")


def msal():
    import msal
    import requests

    client = msal.ManagedIdentityClient(msal.SystemAssignedManagedIdentity(), http_client=requests.Session())
    yield importlib.metadata.version("msal")
    yield "access_token" in client.acquire_token_for_client(resource="https://management.azure.com/")


def google_default():
    import google.auth

    yield importlib.metadata.version("google-auth")
    yield google.auth.default()


def google_token():
    from google.auth.compute_engine import Credentials
    from google.auth.transport.requests import Request

    request = Request()
    yield importlib.metadata.version("google-auth")
    Credentials().refresh(request)
    yield True


def cloud_init():
    from cloudinit import version
    from cloudinit.helpers import Paths
    from cloudinit.sources.DataSourceEc2 import CloudNames, DataSourceEc2

    source = DataSourceEc2({}, None, Paths({}))
    # As on a machine of AWS, which cloud-init knows by its firmware.
    source._cloud_name = CloudNames.AWS
    yield version.version_string()
    yield source.wait_for_metadata_service()


def main():
    client = globals()[sys.argv[1]]()
    print("ready", next(client), flush=True)
    sys.stdin.readline()
    try:
        outcome = "ok" if next(client) else "failed None"
    except Exception as error:
        outcome = f"failed {type(error).__name__}"
    print(outcome, flush=True)


main()
