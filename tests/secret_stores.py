"""AWS Secrets Manager, Azure Key Vault and HashiCorp Vault on loopback, in the part of their wire formats that reading
a secret takes: AWS JSON 1.1 with a signature, Azure REST with its challenge and a managed identity, Vault's HTTP API.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mock_upstream import CERTIFICATE, KEY

TOKEN, IDENTITY, ROLE_ID, SECRET_ID = "hvs.loopback-token", "identity-header-1", "role-1", "secret-of-role-1"
POD = "eyJ.service-account.jwt"


class Stores:
    """All three. values: the secrets, by name; a dict is a secret with fields. broken: every request is answered with
    status 500; asked: (store, name) of each secret that was given out; denied: how often nothing was."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.broken = False
        self.asked: list[tuple[str, str]] = []
        self.denied: list[str] = []
        self.logins: list[str] = []
        self.tokens = {TOKEN}
        self._servers: list[ThreadingHTTPServer] = []
        self.aws, self.vault, self.identity = (self._start(kind) for kind in (Aws, Vault, Identity))
        self.azure = self._start(Azure, tls=True)

    def _start(self, kind: type[Handler], tls: bool = False) -> int:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (kind,), {"stores": self}))
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE, KEY)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._servers.append(server)
        return int(server.server_address[1])

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What leads the libraries here, and to nothing of whoever runs the tests."""
        return {
            "HOME": str(home), "AWS_ENDPOINT_URL_SECRETS_MANAGER": f"http://127.0.0.1:{self.aws}",
            "AWS_ACCESS_KEY_ID": "AKIALOOPBACK", "AWS_SECRET_ACCESS_KEY": "aws-secret-access-key-of-the-tests",
            "AWS_REGION": "eu-west-1", "AWS_EC2_METADATA_DISABLED": "true",
            "IDENTITY_ENDPOINT": f"http://127.0.0.1:{self.identity}/msi/token", "IDENTITY_HEADER": IDENTITY,
            "REQUESTS_CA_BUNDLE": str(CERTIFICATE), "VAULT_ADDR": f"http://127.0.0.1:{self.vault}",
            "VAULT_TOKEN": TOKEN,
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    stores: Stores
    protocol_version = "HTTP/1.1"

    def tell(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        return found

    def deny(self, status: int, body: Any, **headers: str) -> None:
        self.stores.denied.append(self.path)
        self.tell(status, body, **headers)

    def log_message(self, *_: object) -> None:
        pass


class Aws(Handler):
    """POST / with x-amz-target."""

    def do_POST(self) -> None:
        asked = self.body()
        signature = self.headers["authorization"] or ""
        assert self.headers["x-amz-target"] == "secretsmanager.GetSecretValue"
        assert self.headers["content-type"] == "application/x-amz-json-1.1"
        region = "(?:us-east-2|eu-west-1)"  # of an ARN, and of the environment
        if not re.fullmatch(
            rf"AWS4-HMAC-SHA256 Credential=AKIALOOPBACK/\d{{8}}/{region}/secretsmanager/aws4_request, "
            r"SignedHeaders=[a-z0-9;-]+, Signature=[0-9a-f]{64}",
            signature,
        ):
            self.deny(400, {"__type": "UnrecognizedClientException", "message": "The security token is invalid."})
        elif self.stores.broken:
            self.deny(500, {"__type": "InternalServiceError", "message": "of the store"})
        elif asked["SecretId"] not in self.stores.values:
            said = "Secrets Manager can't find the specified secret."
            self.deny(400, {"__type": "ResourceNotFoundException", "Message": said})
        else:
            value = self.stores.values[asked["SecretId"]]
            self.stores.asked.append(("aws", asked["SecretId"]))
            text = json.dumps(value) if isinstance(value, dict) else value
            self.tell(200, {"Name": asked["SecretId"], "SecretString": text, "CreatedDate": 1.7e9})


class Vault(Handler):
    """Version 2 of the key-value store mounted at `secret` and at `team/kv`; AppRole and Kubernetes to log in."""

    def do_GET(self) -> None:
        found = re.fullmatch(r"/v1/(secret|team/kv)/data/([^?]+)(\?.*)?", self.path)
        if self.stores.broken:
            self.deny(500, {"errors": ["internal error"]})
        elif self.headers["x-vault-token"] not in self.stores.tokens:
            self.deny(403, {"errors": ["permission denied"]})
        elif found is None or found[2] not in self.stores.values:
            self.deny(404, {"errors": []})
        else:
            self.stores.asked.append(("vault", found[2]))
            about = {"version": 1, "destroyed": False, "deletion_time": ""}
            self.tell(200, {"request_id": "r", "data": {"data": self.stores.values[found[2]], "metadata": about}})

    def do_POST(self) -> None:
        given = self.body()
        fits = {
            "/v1/auth/approle/login": given == {"role_id": ROLE_ID, "secret_id": SECRET_ID},
            "/v1/auth/kubernetes/login": given == {"role": "tertulia", "jwt": POD},
        }.get(self.path)
        if not fits:
            self.deny(400, {"errors": ["invalid role or secret ID"]})
            return
        self.stores.logins.append(self.path)
        token = f"hvs.login-{len(self.stores.logins)}"
        self.stores.tokens.add(token)
        self.tell(200, {"auth": {"client_token": token, "lease_duration": 60, "renewable": True}})


class Identity(Handler):
    """The endpoint of a managed identity, as App Service has it."""

    def do_GET(self) -> None:
        if self.headers["x-identity-header"] != IDENTITY:
            self.deny(401, {"message": "unknown"})
            return
        until = str(int(time.time()) + 3600)
        self.tell(200, {"access_token": "azure-token", "expires_on": until, "resource": "r", "token_type": "Bearer"})


class Azure(Handler):
    """GET /secrets/NAME/VERSION: a challenge first, then the secret."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        found = re.fullmatch(r"/secrets/([\w-]+)/(\w*)\?api-version=[\w.-]+", self.path)
        if self.headers["authorization"] != "Bearer azure-token":
            # a vault's host lies below that of the resource: 127.0.0.1 below 0.0.1
            challenge = f'Bearer authorization="https://login.test/tenant", resource="https://0.0.1:{port}"'
            self.deny(401, {"error": {"code": "Unauthorized", "message": "AKV10000"}}, WWW_Authenticate=challenge)
        elif self.stores.broken:
            self.deny(500, {"error": {"code": "InternalError", "message": "of the vault"}})
        elif found is None or (name := "/".join(filter(None, found.groups()))) not in self.stores.values:
            self.deny(404, {"error": {"code": "SecretNotFound", "message": "no such secret"}})
        else:
            self.stores.asked.append(("azure", name))
            id = f"https://127.0.0.1:{port}/secrets/{found[1]}/{found[2] or 'v1'}"
            self.tell(200, {"value": self.stores.values[name], "id": id, "attributes": {"enabled": True}})


@contextmanager
def running() -> Iterator[Stores]:
    """The three, until the end of the block."""
    stores = Stores()
    try:
        yield stores
    finally:
        stores.close()
