"""Finds credentials in text: a maintained detector's token-format rules, and a few it lacks.

The rules are those of bc-detect-secrets that are regular expressions for a token's format; its
entropy and keyword rules flag tens of thousands of lines of ordinary prose and are left out.
Never more than a rule's name and a line number leaves this module, and its option to try
credentials out over the network stays off. Values that vendors publish as samples, and what stands
for a value (``changeme``, ``<token>``, ``xxxx``), are no credentials.

Run plainly, the rules manage about 1 MB/s: half of them begin with a class or an option, so the
expression is tried at every character. A cheap test that a rule cannot match without (a literal
it holds, or a run of at least so many token characters, found by translating the bytes and one
substring search) rules nearly every text out first.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from forge.training.system.samples import is_sample

if TYPE_CHECKING:
    from detect_secrets.plugins.base import RegexBasedDetector

_ALPHANUMERIC = string.ascii_letters + string.digits


# Translations by what may stand beside letters and digits: x for a character of the class, a blank for all others.
_TABLES = {
    extra: bytes(0x78 if chr(byte) in _ALPHANUMERIC + extra else 0x20 for byte in range(256))
    for extra in ("", "_-", "+/")
}


@dataclass(frozen=True)
class Secret:
    """Where a credential stands, and by which rule. The credential itself is not kept."""

    path: str
    line: int
    rule: str


@dataclass(frozen=True)
class _Text:
    """A text and what the cheap tests ask of it. Tokens are ASCII, so bytes will do."""

    text: str

    @cached_property
    def folded(self) -> str:
        return self.text.casefold()

    @cached_property
    def encoded(self) -> bytes:
        return self.text.encode("utf-8")

    @cached_property
    def _translated(self) -> dict[str, bytes]:
        return {}

    def has_run(self, length: int, extra: str = "") -> bool:
        """Whether ``length`` letters, digits or characters of ``extra`` stand in a row."""
        if extra not in self._translated:
            self._translated[extra] = self.encoded.translate(_TABLES[extra])
        return b"x" * length in self._translated[extra]


_ARTIFACTORY_PASSWORD = re.compile(r"AP[\dABCDEF][a-zA-Z0-9]{8}")
# A maximal run, a dot, and more; begun only where a run begins, so a base64 blob full of "eyJ" takes linear time.
_JWT_RUN = re.compile(r"(?<![A-Za-z0-9\-_=])[A-Za-z0-9\-_=]{4,}\.(?=[A-Za-z0-9\-_=])")


# By class name, what a rule of bc-detect-secrets 1.5.52 needs to match; one that is not here always runs.
_NEEDS: dict[str, Callable[[_Text], bool]] = {
    "ArtifactoryDetector": lambda t: "AKC" in t.text or _ARTIFACTORY_PASSWORD.search(t.text) is not None,
    "AWSKeyDetector": lambda t: t.has_run(20, "+/"),
    "AzureStorageKeyDetector": lambda t: t.has_run(86, "+/"),
    "BasicAuthDetector": lambda t: "://" in t.text,
    "CloudantDetector": lambda t: t.has_run(24),
    "DiscordBotTokenDetector": lambda t: t.has_run(24, "_-"),
    "GitHubTokenDetector": lambda t: t.has_run(40, "_-"),
    "IbmCloudIamDetector": lambda t: t.has_run(44, "_-"),
    "IbmCosHmacDetector": lambda t: t.has_run(48),
    "JwtTokenDetector": lambda t: "eyJ" in t.text and any("eyJ" in m.group() for m in _JWT_RUN.finditer(t.text)),
    "MailchimpDetector": lambda t: t.has_run(32),
    "NpmDetector": lambda t: t.has_run(36, "_-"),
    "PrivateKeyDetector": lambda t: "PRIVATE KEY" in t.text or "PuTTY-User-Key" in t.text,
    "SendGridDetector": lambda t: "SG." in t.text,
    "SlackDetector": lambda t: "xox" in t.folded or "hooks.slack" in t.folded,
    "SoftlayerDetector": lambda t: t.has_run(64),
    "SquareOAuthDetector": lambda t: "sq0csp-" in t.text,
    "StripeDetector": lambda t: t.has_run(24),
    "TwilioKeyDetector": lambda t: t.has_run(34),
}

# Formats that the detector does not know and that stand in the repositories of people who train models.
_FURTHER_RULES: dict[str, tuple[str, re.Pattern[str]]] = {
    "Hugging Face Token": ("hf_", re.compile(r"\bhf_[A-Za-z0-9]{34,64}\b")),
    "OpenAI API Key": ("T3BlbkFJ", re.compile(r"\bsk-[A-Za-z0-9_-]{10,120}T3BlbkFJ[A-Za-z0-9_-]{10}")),
    "Anthropic API Key": ("sk-ant-", re.compile(r"\bsk-ant-[a-z]+[0-9]{2}-[A-Za-z0-9_-]{40}")),
    "Google API Key": ("AIza", re.compile(r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])")),
    "GitHub Fine-Grained Token": ("github_pat_", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{60}")),
    "GitLab Token": ("glpat-", re.compile(r"\bglpat-[A-Za-z0-9_-]{20}")),
    "PyPI Token": ("pypi-AgEI", re.compile(r"\bpypi-AgEI[A-Za-z0-9_-]{50}")),
    "Private Key": (
        "PRIVATE KEY",  # also encrypted ones and those with header lines, which the detector passes over
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----\s{1,4}(?:[\w-]+: .*\n)*\n?[A-Za-z0-9+/=]{40}"
        ),
    ),
}

# In a sample such as .env.example; a file that is only named .env is not read at all.
_ENVIRONMENT_FILE = re.compile(r"\.env\b.*|.*\.env", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"^[ \t]*(?:export[ \t]+)?\w*(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)\w*"
    r"[ \t]*=[ \t]*[\"']?([^\s\"'#]+)",
    re.IGNORECASE | re.MULTILINE,
)

# Formats that a setting or a message must not hold, looked for without the detector, which not every environment has.
_CREDENTIALS = {
    **{name: pattern for name, (_, pattern) in _FURTHER_RULES.items()},
    "Hugging Face Token": re.compile(r"\bhf_[A-Za-z0-9]{20}"),
    "AWS Access Key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}"),
    "GitHub Token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}"),
    "Slack Token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10}"),
    "Private Key": re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY"),
    "Basic Auth Credentials": re.compile(r"://[^/\s:@]{1,100}:[^/\s:@]{1,100}@"),
}


def credential_rule(text: str) -> str | None:
    """The first credential format that occurs in a short text such as a setting, ``None`` where none does."""
    return next((name for name, pattern in _CREDENTIALS.items() if pattern.search(text)), None)


def find_secrets(path: str, text: str) -> list[Secret]:
    """Every line of ``text`` with a credential on it, by line then rule. Published samples and placeholders are none.

    ``path``: in a file of environment variables, values that are assigned to secrets are judged besides.
    """
    places: set[tuple[int, str]] = set()
    profile = _Text(text)
    for name, detector in _detectors():
        needed = _NEEDS.get(name)
        if (needed is None or needed(profile)) and any(rule.search(text) for rule in detector.denylist):
            places.update((line, detector.secret_type) for line in _lines_of(detector, text))
    for rule_name, (literal, pattern) in _FURTHER_RULES.items():
        if literal in text:
            is_meant = _is_any if rule_name == "Private Key" else _is_meant  # base64 has runs of one letter
            places.update((line, rule_name) for line in _matching_lines(pattern, text, is_meant))
    if _ENVIRONMENT_FILE.fullmatch(path.rsplit("/", 1)[-1]):
        places.update((line, "Assigned Secret") for line in _matching_lines(_ASSIGNMENT, text, _looks_assigned))
    return [Secret(path, line, rule) for line, rule in sorted(places)]


def _lines_of(detector: RegexBasedDetector, text: str) -> list[int]:
    """The lines on which a detector, whose expression is somewhere in the text, finally finds something."""
    from detect_secrets.util.code_snippet import get_code_snippet

    if type(detector).__name__ == "PrivateKeyDetector":  # over several lines; by line it would open the file itself
        return [line for rule in detector.denylist for line in _matching_lines(rule, text, _is_any)]
    lines = text.split("\n")
    numbers = []
    for number, line in enumerate(lines, start=1):
        if any(rule.search(line) for rule in detector.denylist):
            context = get_code_snippet(lines, number)
            found = detector.analyze_line("", line, number, context=context, raw_context=context)
            values = [_value(match) for rule in detector.denylist for match in rule.finditer(line)]
            if found and not all(is_sample(value, line) for value in values):
                numbers.append(number)
    return numbers


def _value(match: re.Match[str]) -> str:
    """What is secret in a match: its group, or all of it where that is only the beginning, such as ``ghp``."""
    has_group = match.re.groups > 0 and match.start(1) > match.start()
    return match[1] if has_group else match[0]


def _matching_lines(pattern: re.Pattern[str], text: str, is_meant: Callable[[str], bool]) -> Iterator[int]:
    """The lines of the matches whose last group, or whole where the pattern has none, ``is_meant``."""
    line, counted = 1, 0
    for match in pattern.finditer(text):
        line, counted = line + text.count("\n", counted, match.start()), match.start()
        if is_meant(match.group(pattern.groups) or ""):
            yield line


def _is_meant(value: str) -> bool:
    return not is_sample(value)


def _is_any(value: str) -> bool:
    return True


def _looks_assigned(value: str) -> bool:
    """Whether a value is neither a word nor stands for one: letters and digits, at least eight characters."""
    is_mixed = any(map(str.isalpha, value)) and any(map(str.isdigit, value))
    return len(value) >= 8 and is_mixed and not is_sample(value)


@cache
def _detectors() -> tuple[tuple[str, RegexBasedDetector], ...]:
    """The detector's rules that are token formats: all that are regular expressions."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    classes = get_mapping_from_secret_type_to_class().values()
    formats = sorted((c for c in classes if issubclass(c, RegexBasedDetector)), key=lambda c: c.__name__)
    return tuple((c.__name__, c()) for c in formats)
