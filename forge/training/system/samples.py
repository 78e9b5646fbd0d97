"""What only looks like a credential: values that vendors publish as samples, and words that stand for a value."""

from __future__ import annotations

import base64
import hashlib
import json
import re

# By SHA-256, so that no scanner finds them here: the key of Azure's storage emulator, GitHub's sample token.
_PUBLISHED = frozenset(
    {
        "0011cc25eb4320717494d2703e8cba85743e71b500283c21c8b88147992f9059",
        "3543c50b0cb9cea8e55eb1f529b79f043cb250d485fde7b66cabbb5183add7da",
    }
)
_PUBLISHED_CLAIMS = (("sub", "1234567890", "John Doe"), ("iss", "joe", None))  # jwt.io, RFC 7519: claim, value, name
_AWS_SAMPLE = re.compile(r"EXAMPLE(?:KEY)?\Z")  # all keys in AWS's documentation end so
_FILLER = re.compile(r"([A-Za-z0-9*.])\1{7}")  # xxxxxxxx, 00000000
_VARIABLE = re.compile(r"[<{$%\[(].*|[^A-Za-z0-9]+|x{3,}", re.IGNORECASE)
_CALLS_FOR_ONE = re.compile(
    r"your|example|sample|dummy|fake|placeholder|change[-_ ]?(?:me|it|this)|replace", re.IGNORECASE
)
_DEFAULTS = frozenset(
    {"password", "passwd", "passphrase", "pass", "pwd", "pw", "secret", "token", "key", "apikey", "user", "username"}
    | {"mypassword", "mysecret", "mypass", "mypwd", "somepassword", "thepassword", "secretpassword", "supersecret"}
    | {"postgres", "mysql", "mariadb", "mongo", "redis", "rabbitmq", "root", "admin", "guest", "test", "minioadmin"}
    | {"foo", "bar", "baz", "null", "none", "todo", "tbd", "redacted"}
)
_LOGIN = re.compile(r"://([^\s:/@]+):([^\s/@]+)@")


def is_sample(value: str, line: str = "") -> bool:
    """Whether a value with the form of a credential is none. ``line``: where it stands, for the user name of a URL."""
    value = value.strip("\"'")
    if _AWS_SAMPLE.search(value) or _FILLER.search(value) or _VARIABLE.fullmatch(value):
        return True
    if hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest() in _PUBLISHED:
        return True
    if value.startswith("eyJ"):
        return _has_published_claims(value)
    if value.lower().replace("-", "").replace("_", "") in _DEFAULTS:
        return True
    if _CALLS_FOR_ONE.search(value) and sum(map(str.isdigit, value)) <= 3:  # a token that was drawn has more digits
        return True
    return any(user == password == value for user, password in _LOGIN.findall(line))


def _has_published_claims(token: str) -> bool:
    """Whether a JSON Web Token says what jwt.io's or the standard's sample says, whoever signed it."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, IndexError):
        return False
    return isinstance(claims, dict) and any(
        claims.get(claim) == value and claims.get("name") == name for claim, value, name in _PUBLISHED_CLAIMS
    )
