"""Strings on which tokenizers differ, made by fixed rules and one seed, and conversations for chat templates."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

_SEED = 9263
_RANDOM_STRINGS = 80
_BLANKS = (" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff")
_CODE = (
    "def f(x: int = 0) -> None:\n\treturn x ** 2 if x else -1e-4\n",
    "#include <vector>\nint main(){std::vector<int>v{1,2};return v[0]<<3;}",
    '{"a": [1, 2.5, null], "b": "\\u00e9\\n"}',
    "SELECT * FROM t WHERE a<>'it''s' AND b LIKE '%x_%';",
    "<div class='a'>&amp;</div><!-- x --><script>/*</script>*/",
    'for i in $(seq 1 10); do echo "$i" >> /dev/null 2>&1; done',
    "            deeply indented\n        less\n\n\n    least",
    "a=b==c!=d<=e>=f&&g||h??i?.j::k=>l->m",
    "__init__ snake_case camelCase HTTPServer2 kebab-case",
    "$$\\int_0^1 \\frac{x}{y}\\,dx$$ \\begin{align}a&=b\\\\\\end{align}",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n\n- [ ] todo\n> quote\n\n```py\nx\n```",
)
# From here on | divides the strings.
_EMOJI = (
    "\U0001f525|\U0001f44d\U0001f3fd|\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466|\u2764\ufe0f|"
    "\U0001f1e9\U0001f1ea\U0001f1eb|1\ufe0f\u20e3|\U0001f3f4\U000e0067\U000e0062\U000e007f|\u263a\ufe0e|"
    "\U0001f9d1\u200d\U0001f680 in \U0001f30d!|a\U0001f600b\U0001f600\U0001f600c"
)
_RIGHT_TO_LEFT = (
    "\u0628\u0633\u0645 \u0627\u0644\u0644\u0647|\u05e9\u05dc\u05d5\u05dd, \u05e2\u05d5\u05dc\u05dd!|"
    "\u202bab\u202c \u200fcd\u200e|abc \u0645\u0631\u062d\u0628\u0627 123 \u0664\u0665\u0666|"
    "\u0715\u0710 \u078b\u07a8|(\u05d0) [\u05d1] {\u05d2}"
)
_SCRIPTS = (
    "\u706b\u3068\u6c34\u3002|\ud55c\uad6d\uc5b4 \ubb38\uc7a5|\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22|"
    "\u0939\u093f\u0928\u094d\u0926\u0940|\u1780\u17d2\u1798\u17c2\u179a|"
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03c3\u03c2\u03a3|"
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0451\u0439|\u01c5\u01f2 \ufb01 \u00df\u1e9e|"
    "\u0130\u0131 \u017f\u212a's 'S|na\u00efve \u00e9t\u00e9 \u00fcbt|x\u00b2\u00bd\u2167\u3289|"
    "\U00010330\U0001d54f\U0001f130"
)
_NUMBERS = (
    "0|1234567890|3.14159e-26|1,000,000|007|0x7fFF|1/2|12:34:56|192.168.0.1/24|"
    "\u0661\u0662\u0663|\uff11\uff12|\u00b2\u00b3|\u2160\u2161|-1+2*3%4|2024-02-29T00:00Z"
)
_CONTRACTIONS = "it's they'LL I'd we'Ve you'RE 'tis 'T 'm|it\u2019s they\u2019ll|'s's'S|rock'n'roll o'clock"
_NOT_IN_NFC = (
    "e\u0301|e\u0301te\u0301|A\u030a|o\u0308\u0304|\u212b|\u1e9b\u0323|\u0958|\u0344|\u1100\u1161\u11a8|"
    "\u2126 \u212a|\uf900\uf901|q\u0307\u0323|a\u0315\u0300\u05ae|\u2adc|\ufb1d"
)


def awkward_strings(control: Sequence[str]) -> dict[str, list[str]]:
    """Kind -> strings: a few hundred in all, the same with every run of one Python.

    ``control``: the control tokens' texts. Only assigned characters of Python's Unicode version are used, and no lone
    surrogates, which have no UTF-8.
    """
    chance = random.Random(_SEED)
    strings = {
        "empty and blank": ["", *_BLANKS, *(blank * 3 for blank in _BLANKS), "\n \n\t\n  ", " " * 33, "\t" * 17],
        "blanks around words": [
            *(f"a{blank}b" for blank in _BLANKS),
            *(f"{' ' * n}word{' ' * n}" for n in (1, 2, 3, 7)),
            *("trailing ", "a  b   c    d", "a\r\nb\r", "x\n\n\n\ny \n z", " \n", "\n a", "!\n\n", " !\r\n"),
        ],
        "numbers": [*_NUMBERS.split("|"), "9" * 65],
        "contractions": [*_CONTRACTIONS.split("|"), "'" * 9],
        "code": list(_CODE),
        "emoji": _EMOJI.split("|"),
        "right to left": _RIGHT_TO_LEFT.split("|"),
        "scripts": _SCRIPTS.split("|"),
        "runs": ["x" * 300, "ab" * 99, "." * 80, "=" * 64 + "\n", "\u00e9" * 40, "\u706b" * 50, "-_" * 30, "A" * 17],
        "characters of every category": _categories(chance),
        "C0 controls and odd bytes": [
            *("\x00", "\x00\x01\x02", "a\x00b", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\ufffd", "\ufffe"),
            *("\U0010ffff", "\ue000\ue001", "\xad", "\u00ff"),
        ],
        "control tokens": [
            *control,
            *(f"a{token}b" for token in control),
            *(f" {token}\n" for token in control),
            *(token * 2 for token in control),
            *(f"{begin}user\nhi{end}\n" for begin, end in pairwise(control)),
        ],
        "lookalikes of control tokens": [
            *(variant for token in control for variant in _lookalikes(token)),
            *("<s>", "</s>", "a</s>b", "<unk>", "[INST]", "<<SYS>>", "<|endoftext", "<|", "|>", "<||>", "<|im_sep|>"),
            *("<|eot_id|>", "<end_of_turn>", "<EOT>", "<|fim_prefix|>", "<tool_call>", "<think></think>", "<0x0A>"),
        ],
        "mixtures": [],
        "not in NFC": _NOT_IN_NFC.split("|"),
    }
    pieces = [text for kind, texts in strings.items() if kind != "not in NFC" for text in texts if 0 < len(text) < 24]
    composed = [text for text in pieces if unicodedata.is_normalized("NFC", text)]
    for _ in range(_RANDOM_STRINGS):
        mixture = "".join(chance.choice(composed) for _ in range(chance.randint(2, 6)))
        strings["mixtures"].append(unicodedata.normalize("NFC", mixture))
    return strings


def _categories(chance: random.Random) -> list[str]:
    """A few characters of every Unicode category but unassigned and surrogates, alone and inside text."""
    by_category: dict[str, list[str]] = {}
    for point in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(point))
        if category not in ("Cn", "Cs"):
            by_category.setdefault(category, []).append(chr(point))
    strings = []
    for category in sorted(by_category):
        chosen = chance.sample(by_category[category], min(8, len(by_category[category])))
        strings += ["".join(chosen), *(f"a{c}1 {c}{c}z" for c in chosen[:4])]
    return strings


def _lookalikes(token: str) -> list[str]:
    first, second = token[: len(token) // 2], token[len(token) // 2 :]
    others = (token.replace("<", "\uff1c").replace(">", "\uff1e"), token.replace("|", "\u2502"))
    variants = [token[:-1], token[1:], token.upper(), f"{first} {second}", f"{first}\u200b{second}", *others]
    return [*variants, f"<{token}>", f"\\{token}"]


_CONVERSATIONS = {
    "a question": [("user", "Who counts the ships?")],
    "with a system message": [("system", "You keep a lighthouse."), ("user", "Who counts the ships?")],
    "several turns": [("system", "Be brief."), ("user", "One?"), ("assistant", "One."), ("user", "And two?")],
    "turns without a system message": [("user", "One?"), ("assistant", "One."), ("user", "Two?")],
    "blanks kept": [("user", "  two before, a line end after \n"), ("assistant", "\n"), ("user", " ")],
    "other scripts": [
        ("system", "\u706b\u3068\u6c34"),
        ("user", "\u00dcbt \u05e9\u05dc\u05d5\u05dd \U0001f9d1\u200d\U0001f680?"),
    ],
    "braces and markup": [("user", "{{ .System }} {% if x %} <b>&amp;</b> \"q\" 'q' \\n")],
    "code": [("user", "```py\ndef f(x):\n\treturn x\n```\n\n| a |\n|---|")],
    "a long message": [("user", "word " * 400)],
}
CONVERSATIONS = {
    name: [{"role": role, "content": content} for role, content in turns] for name, turns in _CONVERSATIONS.items()
}
