"""Secrets: every rule finds its format, the cheap tests lose nothing, ordinary text is left alone.

No token stands here as one literal: this repository's own scanners would rightly object.
"""

from __future__ import annotations

import base64
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.training.system import secrets
from forge.training.system.secrets import Secret, find_secrets

ASCII = st.characters(min_codepoint=9, max_codepoint=126)
LETTERS = "Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIo"
PEM = "".join(["-----BEGIN ", "PRIVATE KEY-----"])
SAMPLES = {
    "AWS Access Key": "AKIA" + "Z7QK3M5N2P8R4T6V",
    "GitHub Token": "ghp_" + LETTERS,
    "GitHub Fine-Grained Token": "github_pat_" + LETTERS * 2,
    "GitLab Token": "glpat-" + LETTERS[:20],
    "Hugging Face Token": "hf_" + LETTERS[:34],
    "OpenAI API Key": "sk-proj-" + LETTERS[:20] + "T3Blbk" + "FJ" + LETTERS[:20],
    "Anthropic API Key": "sk-ant-" + "api03-" + LETTERS * 2,
    "Google API Key": "AIza" + LETTERS[:35],
    "PyPI Token": "pypi-" + "AgEI" + LETTERS * 2,
    "Slack Token": "xoxb-" + "123456789012-abcdefghij",
    "Discord Bot Token": "M" + LETTERS[:11] + "-" + LETTERS[:11] + "." + LETTERS[:6] + "." + LETTERS[:27],
    "Stripe Access Key": "sk_live_" + LETTERS[:24],
    "SendGrid API Key": "SG." + LETTERS[:22] + "." + (LETTERS * 2)[:43],
    "Basic Auth Credentials": "postgres://admin:" + "hunter2@db.internal/x",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxIn0." + "c2lnbmF0dXJl",
    "Twilio API Key": "AC" + "0123456789abcdef" * 2,
}


@pytest.mark.parametrize("rule", SAMPLES)
@pytest.mark.parametrize("around", ["{}", "\n\n{}", "see {} here\n", 'key = "{}"\n', "a\u2028b `{}`\n", "é{{}} ({})"])
def test_each_format_is_found_with_its_line_wherever_it_stands(rule: str, around: str) -> None:
    text = around.format(SAMPLES[rule])
    line = text[: text.index(SAMPLES[rule])].count("\n") + 1
    assert Secret("a.md", line, rule) in find_secrets("a.md", text)


def test_letter_case_does_not_hide_a_token() -> None:
    assert find_secrets("a.md", SAMPLES["Slack Token"].upper()) == [Secret("a.md", 1, "Slack Token")]


@pytest.mark.parametrize(
    "text",
    [
        PEM + "\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj" * 3,
        PEM.replace("PRIVATE", "RSA PRIVATE") + "\nProc-Type: 4,ENC\nDEK-Info: AES,0\n\n" + "MIIEvQIBADANBgkqhkiG" * 3,
        PEM.replace("PRIVATE", "ENCRYPTED PRIVATE") + "\n" + "MIIEvQIBADANBgkqhkiG" * 3,
    ],
)
def test_private_keys_are_found_plain_encrypted_and_with_headers(text: str) -> None:
    assert find_secrets("k", "before\n" + text) == [Secret("k", 2, "Private Key")]


@pytest.mark.parametrize(
    "text",
    [
        "The header is `" + PEM + "` and a key follows.",
        "`ghp_...`, `hf_xxx` and `AKIA` begin such tokens; `sk-estimator-doc-link-long-name` is a CSS class.",
        "A digest: " + "0123456789abcdef" * 4 + " and a UUID 123e4567-e89b-12d3-a456-426614174000",
        "-" * 80 + "\n| a | b |\n" + "=" * 80,
        "https://example.org/a/very/long/path/with-dashes_and_underscores/" + "x" * 60,
        "Ask user:name@place about `https://${USER}:${PASSWORD}@host`.",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert find_secrets("a.md", text) == []


def test_a_finding_holds_no_part_of_the_secret() -> None:
    for secret in SAMPLES.values():
        for found in find_secrets("a.md", f"x {secret}"):
            assert secret[8:20] not in repr(found)


def test_every_rule_of_the_detector_has_its_cheap_test_and_no_entropy_rule_is_used() -> None:
    used = {name for name, _ in secrets._detectors()}
    assert used == set(secrets._NEEDS)
    assert not {name for name in used if "Entropy" in name or "Keyword" in name}


@pytest.mark.parametrize("name", secrets._NEEDS)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_cheap_tests_never_lose_what_a_rule_would_match(name: str, data: st.DataObject) -> None:
    detector = dict(secrets._detectors())[name]
    pattern = data.draw(st.sampled_from(list(detector.denylist)))
    text = data.draw(st.text(ASCII, max_size=20)) + "\n" + data.draw(st.from_regex(pattern, alphabet=ASCII))
    if any(rule.search(text) for rule in detector.denylist):
        assert secrets._NEEDS[name](secrets._Text(text))


@pytest.mark.parametrize(
    "unit", ["eyJ", "a1B2", "xoxb-1-", "AKC", "aws key ", "://a:", "SG.", "-", "=", "PRIVATE KEY\n"]
)
def test_a_megabyte_of_the_start_of_a_token_is_scanned_in_linear_time(unit: str) -> None:
    def seconds(num: int) -> float:
        text = unit * (num // len(unit))
        started = time.process_time()
        find_secrets("a", text)
        return time.process_time() - started

    seconds(1000)
    assert seconds(1_200_000) < 8 * max(seconds(300_000), 0.05)


def unsigned(claims: dict[str, object]) -> str:
    """A JSON Web Token with these claims."""
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "HS256"}, claims)
    ]
    return ".".join([*parts, "c2lnbmF0dXJl"])


NO_CREDENTIALS = {
    "AWS's sample key": "AKIA" + "QPZO4MWNR7EXAMPLE"[:9] + "EXAMPLE",
    "AWS's sample secret": 'aws_secret_access_key = "' + "k7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0P" + "EXAMPLEKEY" + '"',
    "jwt.io's": unsigned({"sub": "1234567890", "name": "John Doe", "iat": 1516239022}),
    "jwt.io's as an administrator": unsigned({"sub": "1234567890", "name": "John Doe", "admin": True}),
    "a filled token": "ghp_" + "x" * 36,
    "a filled webhook": "https://hooks.slack.com/services/" + "T00000000/B00000000/" + "X" * 24,
    "Azure's emulator": "AccountKey="
    + "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6"
    + "tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "a word for a password": "postgres://user:" + "password@db.internal/x",
    "a call for one": "https://me:" + "your-token-here@git.internal/x",
    "a variable": "amqp://app:" + "$PASSWORD@queue.internal",
    "the user's name again": "postgres://shop:" + "shop@localhost/shop",
}


@pytest.mark.parametrize("case", NO_CREDENTIALS)
def test_published_samples_and_placeholders_are_no_secrets(case: str) -> None:
    assert find_secrets("page.md", f"For example `{NO_CREDENTIALS[case]}` here.\n") == []


CREDENTIALS = {
    "a key beside a sample": "AKIA" + "QPZO4MWNREXAMPLE and AKIA" + "Z7QK3M5N2P8R4T6V",
    "EXAMPLE elsewhere": "AKIA" + "EXAMPLE3M5N2P8R4",
    "other claims": unsigned({"sub": "1234567890", "name": "Joan Doe"}),
    "a user's password": "postgres://admin:" + "Tr0ub4dor@db.internal/x",
    "a key with a run of one letter": PEM
    + "\nb3BlbnNzaC1rZXktdjEA"
    + "A" * 12
    + "BG5vbmUAAAAEbm9uZQ"
    + "A" * 9
    + "BAAAAMwAAAAtzc2gtZW",
    "a PGP key": PEM.replace("PRIVATE KEY", "PGP PRIVATE KEY BLOCK")
    + "\n\nlQdGBGX5c2sBEADKJ4Zq7Rw2Lk9Xv4Bn6Tm1Yc8Hd3Jf5Gs0PaUeIoZq\n",
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_what_only_resembles_a_sample_is_a_secret(case: str) -> None:
    assert len(find_secrets("chapter.asc", f"See:\n{CREDENTIALS[case]}\n")) == 1


def test_an_environment_file_is_judged_by_what_it_assigns() -> None:
    placeholders = (
        "SECRET_KEY=\nAPI_KEY=<your key>\nDB_PASSWORD=changeme\nJWT_SECRET='your-256-bit-secret'\nTOKEN_SECONDS=3600\n"
    )
    assert find_secrets(".env.example", placeholders + "MODE=a1b2c3d4e5\nexport SMTP_PASS_HINT=none\n") == []
    found = find_secrets("a/.env.example", placeholders + "export MAIL_PASSWORD='v9Lq2xTr'\n")
    assert found == [Secret("a/.env.example", 6, "Assigned Secret")]
    assert find_secrets("a.md", "MAIL_PASSWORD='v9Lq2xTr'\n") == []
