"""Where secrets are kept: the environment, files, AWS Secrets Manager, Azure Key Vault and HashiCorp Vault.

Each store reads one secret by the part of a reference behind its scheme, and waits for it: call it from a thread. The
last three speak through their makers' own libraries, which are extras, imported when a reference asks for them and told
who we are by the environment, as every other program that uses them is. No message of ours repeats what they say.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

CONNECT_SECONDS, READ_SECONDS = 5, 10
FILE_LIMIT = 65536  # bytes of a file with a secret
LEASE_PATH = "/var/run/secrets/kubernetes.io/serviceaccount/token"
# At the level `debug` they would log whole answers, secrets among them; at others what we say ourselves.
TALKATIVE = ("boto3", "botocore", "azure", "msal", "hvac", "urllib3", "requests")


class NotRead(Exception):
    """A secret could not be had; str() says why, without a word of the secret."""


class Store(Protocol):
    """One place of secrets."""

    remote: bool  # it is asked over a network

    def check(self, where: str) -> None:
        """Raises NotRead for what can never be read: a wrong form, or a library that is not there."""

    def read(self, where: str) -> str:
        """Raises NotRead; what it lets through of a library's errors says its kind alone."""


class Environment:
    """`env:NAME`."""

    remote = False

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def check(self, where: str) -> None:
        self.read(where)

    def read(self, where: str) -> str:
        if not where.replace("_", "a").isalnum():  # it may be the secret itself
            raise NotRead("expected the name of an environment variable after env:")
        if not self._environment.get(where):
            raise NotRead(f"the environment variable {where} is not set")
        return self._environment[where]


class Files:
    """`file:PATH`: all of it, but for white space around it."""

    remote = False

    def check(self, where: str) -> None:
        self.read(where)

    def read(self, where: str) -> str:
        try:
            with Path(where).expanduser().open("rb") as file:
                return file.read(FILE_LIMIT).decode().strip()
        except OSError as error:
            raise NotRead(f"{where} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise NotRead(f"{where} cannot be read (not text in UTF-8)") from None


class Aws:
    """`aws:ID` or `aws:ID#FIELD`: a secret of AWS Secrets Manager by name or ARN, or one field of it, being JSON."""

    remote = True

    def __init__(self) -> None:
        self._clients: dict[str | None, Any] = {}

    def check(self, where: str) -> None:
        if not where.partition("#")[0]:
            raise NotRead("expected aws:ID or aws:ID#FIELD")
        library("boto3", "aws")

    def read(self, where: str) -> str:
        id, mark, field = where.partition("#")
        answer = self._client(id).get_secret_value(SecretId=id)
        text = answer["SecretString"] if "SecretString" in answer else answer["SecretBinary"].decode()
        return of_field(text, field) if mark else str(text)

    def _client(self, id: str) -> Any:
        """One for each region: that of the ARN, or else the one that boto3 finds."""
        region = id.split(":")[3] if id.startswith("arn:") and id.count(":") >= 6 else None
        if region not in self._clients:
            boto3 = library("boto3", "aws")
            config = library("botocore.config", "aws").Config(
                connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, user_agent_extra="tertulia",
                retries={"mode": "standard", "total_max_attempts": 3},
            )  # fmt: skip
            session = boto3.session.Session()
            region_name = region or session.region_name or os.environ.get("AWS_REGION")
            self._clients[region] = session.client("secretsmanager", region_name=region_name, config=config)
        return self._clients[region]


class Azure:
    """`azure:VAULT/SECRET` or `azure:VAULT/SECRET/VERSION`: of Azure Key Vault. VAULT is a name below vault.azure.net,
    or, with a dot in it, the whole host of a vault elsewhere."""

    remote = True

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def check(self, where: str) -> None:
        parts = where.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise NotRead("expected azure:VAULT/SECRET or azure:VAULT/SECRET/VERSION")
        library("azure.identity", "azure")
        library("azure.keyvault.secrets", "azure")

    def read(self, where: str) -> str:
        vault, _, rest = where.partition("/")
        name, _, version = rest.partition("/")
        return str(self._client(vault).get_secret(name, version or None).value or "")

    def _client(self, vault: str) -> Any:
        if vault not in self._clients:
            who = library("azure.identity", "azure").DefaultAzureCredential(process_timeout=READ_SECONDS)
            host = vault if "." in vault else f"{vault}.vault.azure.net"
            self._clients[vault] = library("azure.keyvault.secrets", "azure").SecretClient(
                f"https://{host}", who, connection_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS,
                retry_total=2, retry_backoff_max=2,
            )  # fmt: skip
        return self._clients[vault]


class Vault:
    """`vault:PATH#FIELD`: a field of a secret of HashiCorp Vault's key-value store, version 2. PATH is as the `vault`
    command has it, MOUNT/NAME, or as the API has it, MOUNT/data/NAME, for a mount with slashes in its name.

    VAULT_ADDR, VAULT_NAMESPACE and VAULT_CACERT say where. VAULT_TOKEN (or ~/.vault-token) says who; without one
    VAULT_ROLE_ID and VAULT_SECRET_ID (AppRole), or VAULT_KUBERNETES_ROLE (the service account of this pod). The method
    is mounted at VAULT_AUTH_MOUNT, if not where it is as a rule.
    """

    remote = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._client: Any = None

    def check(self, where: str) -> None:
        path, _, field = where.partition("#")
        if not field or not all(part.strip("/") for part in self._place(path)):
            raise NotRead("expected vault:MOUNT/NAME#FIELD")
        library("hvac", "vault")

    def read(self, where: str) -> str:
        path, _, field = where.partition("#")
        hvac = library("hvac", "vault")
        fresh = self._client is None
        try:
            return self._read(path, field)
        except (hvac.exceptions.Forbidden, hvac.exceptions.Unauthorized):
            self._client = None  # what we logged in with has expired
            if fresh:
                raise
        return self._read(path, field)

    def _read(self, path: str, field: str) -> str:
        if self._client is None:
            self._client = self._logged_in()
        mount, name = self._place(path)
        answer = self._client.secrets.kv.v2.read_secret_version(
            path=name, mount_point=mount, raise_on_deleted_version=True
        )
        return of_field(answer["data"]["data"], field)

    @staticmethod
    def _place(path: str) -> tuple[str, str]:
        """(mount, name)."""
        mount, mark, name = path.strip("/").partition("/data/")
        if not mark:
            mount, _, name = path.strip("/").partition("/")
        return mount, name

    def _logged_in(self) -> Any:
        given = self._environment.get
        address, options = given("VAULT_ADDR", "https://127.0.0.1:8200"), {}
        if given("VAULT_CACERT"):
            options["verify"] = given("VAULT_CACERT")
        client = library("hvac", "vault").Client(
            url=address, namespace=given("VAULT_NAMESPACE"), timeout=READ_SECONDS, **options
        )
        if client.token:
            return client
        role, mount = given("VAULT_KUBERNETES_ROLE"), given("VAULT_AUTH_MOUNT")
        if given("VAULT_ROLE_ID"):
            client.auth.approle.login(
                given("VAULT_ROLE_ID"), secret_id=given("VAULT_SECRET_ID"), mount_point=mount or "approle"
            )
        elif role:
            jwt = Files().read(given("VAULT_KUBERNETES_TOKEN_PATH", LEASE_PATH))
            client.auth.kubernetes.login(role, jwt, mount_point=mount or "kubernetes")
        else:
            raise NotRead("there is no VAULT_TOKEN, VAULT_ROLE_ID or VAULT_KUBERNETES_ROLE to log in with")
        return client


def stores(environment: Mapping[str, str]) -> dict[str, Store]:
    """Every place of secrets, by the scheme of its references."""
    return {
        "env": Environment(environment), "file": Files(), "aws": Aws(), "azure": Azure(), "vault": Vault(environment),
    }  # fmt: skip


def library(name: str, extra: str) -> Any:
    """A module of an extra. Raises NotRead that says how to get it."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotRead(f"that needs the extra `{extra}` (pip install 'tertulia[{extra}]'): no {error.name}") from None
    for logger in TALKATIVE:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    return module


def of_field(secret: Any, field: str) -> str:
    """One text of a secret that has several: an object, or the JSON of one. Raises NotRead."""
    if isinstance(secret, str):
        try:
            secret = json.loads(secret)
        except ValueError:
            raise NotRead(f"it is no JSON object, and has no field {field!r}") from None
    found = secret.get(field) if isinstance(secret, dict) else None
    if not isinstance(found, str):
        raise NotRead(f"it has no field {field!r} with text in it")
    return found


def kind_of(error: Exception) -> str:
    """What went wrong in a library, in its own name for it and without its sentences: they may hold anything."""
    answer = getattr(error, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None  # botocore's ClientError
    if isinstance(code, str) and code.isalnum() and len(code) < 64:
        return code
    status = getattr(error, "status_code", None)  # azure.core's HttpResponseError
    return type(error).__name__ + (f", status {status}" if isinstance(status, int) else "")
