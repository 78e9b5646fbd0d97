"""What the probes of this suite answer, key by key: written by a probe, read by its judges and by the report.

As the store gives it, each answer also has what the probe runner adds: ``key``, ``machine``, ``started_at`` and others.
Digests are hex SHA-256. Nats are per predicted token.
"""

from __future__ import annotations

from typing import Any, TypedDict

from harness.verdict import Status

Judged = tuple[Status, str, dict[str, Any]]  # what a judge makes of an answer: status, reason, figures for the report

# ----------------------------------------------------------------------------------------------------------------------
# merge


class WorstTensor(TypedDict):
    """The merged tensor that is furthest from the exact sum."""

    tensor: str | None
    error_in_tolerances: float  # its largest error / what rounding allows there


class MergedTensors(TypedDict):
    """All tensors of the merged weights beside base + scale B A, computed in float64."""

    num_adapter_pairs: int
    num_changed_tensors: int  # with an adapter
    num_same_tensors: int  # without one
    differing_tensors: list[str]  # without an adapter, and not the base's bytes
    missing_tensors: list[str]  # on one side only
    fitted_scale: float | None  # by least squares over all changed numbers; `None` where the adapter is zero
    worst: WorstTensor
    rounding_share_of_change: float | None  # norm of the rounding errors / norm of the change


class MergeAnswer(MergedTensors):
    """The merged model beside base and adapter."""

    run: dict[str, Any]  # adapter_sha256
    scale: float  # by the config: alpha / rank, or alpha / sqrt(rank)
    adapter_states_scale: float  # by the adapter's own adapter_config.json
    differing_files: list[str]  # configuration and tokenizer files that are not the base's bytes


# ----------------------------------------------------------------------------------------------------------------------
# tokens


class KindOfStrings(TypedDict):
    """How many strings of a kind there are, and how many llama.cpp reads as the tokenizer does."""

    num_strings: int
    num_equal: int
    num_not_nfc: int  # known exception: equal once composed (NFC)
    num_end_of_turn: int  # known exception: ordinary text that llama.cpp takes for the end of a turn


class DifferentString(TypedDict):
    """A string that is read differently without being a known exception."""

    kind: str
    text: str  # escaped to ASCII, 120 characters at most
    wanted: list[int]  # the tokenizer's ids, 24 at most
    found: list[int]  # llama.cpp's


class StringsAnswer(TypedDict):
    """All strings, in one way of reading them."""

    by_kind: dict[str, KindOfStrings]
    num_differing: int
    differences: list[DifferentString]  # the first 20


class Conversation(TypedDict):
    """A conversation up to the answer, by the GGUF file's template and by the tokenizer's."""

    name: str
    text_is_equal: bool
    ids_are_equal: bool


class SpecialIds(TypedDict):
    """Ids of special tokens; ``None``: there is none."""

    bos: int | None
    eos: int | None
    padding: int | None


class SpecialsAnswer(TypedDict):
    """The special tokens."""

    tokenizer: SpecialIds
    written: SpecialIds  # in the GGUF file
    used: SpecialIds  # by llama.cpp
    tokenizer_adds_bos: bool  # in front of a text
    llama_cpp_adds_bos: bool
    tokenizer_adds_eos: bool  # behind a text
    llama_cpp_adds_eos: bool
    ends_of_turn: list[str]  # texts at which llama.cpp stops
    eos_ends_a_turn: bool  # the tokenizer's EOS is one of them
    ordinary_text_that_ends_a_turn: list[str]  # those that are no control tokens of the tokenizer


class ModelfileConversation(TypedDict):
    """A conversation up to the answer, by the Modelfile's template and by the tokenizer's."""

    name: str
    text_is_equal: bool


class ModelfileAnswer(TypedDict):
    """The Modelfile, parsed."""

    model: str  # after FROM
    model_exists: bool
    has_template: bool
    stops: list[str]
    stops_at_eos: bool  # at the tokenizer's EOS
    conversations: list[ModelfileConversation]  # none without a template


class TokensAnswer(TypedDict):
    """A GGUF file's vocabulary and templates beside the tokenizer."""

    run: dict[str, Any]  # adapter_sha256, tokenizer_sha256
    file: dict[str, Any]  # name, pre_tokenizer
    strings: dict[str, StringsAnswer]  # by how control tokens are read: "control tokens named", "plain text"
    template_is_equal: bool  # the file's chat template is the tokenizer's, as text
    conversations: list[Conversation]
    specials: SpecialsAnswer
    modelfile: ModelfileAnswer | None  # `None`: there is none


# ----------------------------------------------------------------------------------------------------------------------
# provenance


class Link(TypedDict):
    """One digest that a record states, beside that of the artefact."""

    artefact: str
    stated_in: str  # file name of the record
    stated: str | None  # `None`: no record names it
    found: str | None  # `None`: the artefact is missing
    holds: bool


class ProvenanceAnswer(TypedDict):
    """All links from corpus to Modelfile."""

    run: dict[str, Any]  # adapter_sha256
    links: list[Link]
    llama_cpp_commit: str | None


# ----------------------------------------------------------------------------------------------------------------------
# divergence. A model is named "base", "adapter", "merged", by a GGUF file's type, or as a control of the probe.


class Pair(TypedDict):
    """Predictions of two models. The standard error is over documents, ``None`` with one document."""

    reference: str
    subject: str
    mean_kl_nats: float  # KL(reference || subject)
    standard_error_nats: float | None
    largest_kl_nats: float  # of one prediction
    same_top_share: float  # of predictions whose most probable token is the same


class Step(TypedDict):
    """A model's held-out loss and its paired change from the model before it; ``None`` for the first."""

    subject: str
    nats_per_token: float
    change_nats_per_token: float | None
    standard_error_nats_per_token: float | None  # over documents; `None` with one document


class HeldOut(TypedDict):
    """The text that is predicted."""

    num_documents: int
    num_tokens: int  # predicted
    examples_sha256: str
    most_tokens_a_document: int


class FourBit(TypedDict, total=False):
    """The adapter on the 4-bit base that it was trained on; only ``why`` where that could not be measured."""

    why: str
    nats_per_token: float
    shift_nats_per_token: float  # of the loss, from the 4-bit base to the original one
    standard_error_nats_per_token: float | None


class GreedyText(TypedDict):
    """The greedy continuation of one prompt by the merged weights and by a GGUF file."""

    merged: str
    found: str  # the file's
    is_equal: bool  # token by token
    num_tokens: int  # of the merged weights' text
    parts_at: int | None  # the first token that differs
    lead_nats: float | None  # the merged weights' logit there, over their second choice's
    smallest_lead_nats: float | None  # of any token


class Greedy(TypedDict):
    """Greedy continuations of several prompts."""

    subject: str  # the file's type
    num_tokens: int  # at most, per answer
    answers: list[GreedyText]


class DivergenceAnswer(TypedDict):
    """What an export loses, step by step."""

    run: dict[str, Any]  # adapter_sha256, merged_sha256
    base: dict[str, Any]  # sha256, shape, dtype
    held_out: HeldOut
    files: dict[str, dict[str, Any]]  # by type: forge.training.export.gguf.GgufReport
    pairs: list[Pair]
    chain: list[Step]  # base, adapter, merged, then the files
    four_bit: FourBit | None  # `None`: the base was not trained on in 4 bits
    greedy: Greedy
    documents: list[dict[str, Any]]  # document, num_tokens, sums by model or pair


# ----------------------------------------------------------------------------------------------------------------------
# the export at 7B, which is timed and not judged


class TimingAnswer(TypedDict):
    """What export.json says of an export whose files are then deleted."""

    schema_version: int
    key: str
    machine: str
    gpu: str | None
    shape: dict[str, Any] | None
    steps: list[dict[str, Any]]  # name, seconds, num_bytes (written), peak_rss_bytes
    needed_disk_bytes: int
    files: dict[str, int]  # bytes by type
    fallbacks: dict[str, list[str]]  # by type, the tensors that are of another one
