"""Why a softmax was left alone: the record, and the catalogue of codes that users meet.

A refusal is made where the matcher gives up and carries the node it stands at. Codes are stable; `CATALOGUE` is the page
that explains them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """One kind of refusal."""

    code: str
    title: str
    meaning: str
    hint: str


_ROWS = (
    # 1xx: no attention, or none of our business
    Code("FF101", "not an attention", "The softmax does not lie between two matrix products.",
         "Nothing to do: flashfuse only replaces softmax(QK^T)V."),
    Code("FF102", "already one kernel", "F.scaled_dot_product_attention without a mask is one fused kernel in PyTorch.",
         'Nothing to do. options={"sdpa": "always"} takes it anyway.'),
    Code("FF103", "opaque call", "The attention is inside a call that cannot be looked into.",
         "For nn.TransformerEncoder's inference fast path: torch.backends.mha.set_fastpath_enabled(False)."),
    Code("FF104", "could not be read", "The graph could not be brought into normal form.",
         "Please report this graph; it was compiled as it is."),
    # 2xx: the products and the layout
    Code("FF201", "no product before the softmax", "The scores do not come from one product of two tensors.",
         "Scores must be query @ key^T, possibly scaled, masked or biased afterwards."),
    Code("FF202", "softmax over another dim", "The softmax does not run over the keys that the second product sums over.",
         "Attention normalises over the last dim of query @ key^T."),
    Code("FF203", "ambiguous key layout", "Key and value order their head and key axes differently and the sizes cannot "
         "tell them apart, so this may not be query @ key^T.", "Use key.transpose(-2, -1)."),
    Code("FF204", "layout", "An operand reaches the product in a layout that no strided view describes.",
         "Keep batch, head, sequence and head_dim as separate axes, or flatten only batch and heads."),
    Code("FF206", "dtype", "Only float16, bfloat16 and float32 attention has kernels.", "Cast to a supported dtype."),
    Code("FF207", "head dim", "Kernels exist for head dims from 1 to 512 (float32 on GPUs: 256).", "Use a smaller head_dim."),
    Code("FF208", "device", "There is no kernel for this device.", "Use an NVIDIA GPU or the CPU."),
    # 3xx: values that others need
    Code("FF303", "written in place", "A tensor of the attention is written in place before the attention is finished.",
         "Write into a copy, or after the attention."),
    Code("FF304", "input not reachable", "An input of the attention has no counterpart in the captured graph.",
         "Please report this graph; it was compiled as it is."),
    # 4xx: what happens to the scores
    Code("FF401", "unknown operation", "An operation between query @ key^T and the output has no meaning to flashfuse.",
         "Express it elementwise on the scores, or report it."),
    Code("FF402", "argument", "An argument of an operation has a value that flashfuse does not know.", "Use the plain form."),
    Code("FF403", "no query @ key^T", "The scores come from a product whose second factor differs for each query, or from "
         "products that mix the heads of scores.", "Only query @ key^T and terms added to it can be fused."),
    Code("FF405", "gradient of a capture", "A tensor that needs a gradient is read at computed positions, or in two ways.",
         "Detach it, or index it once and plainly by batch, head, query and key."),
    Code("FF407", "dropout used elsewhere", "The probabilities after dropout are also used outside the attention, which would "
         "see another mask than the output was computed with.", "Use the probabilities before dropout, or do not return them."),
    Code("FF408", "gradient stopped", "Between query @ key^T and the output a value is detached or computed under no_grad, so "
         "that the whole attention has another gradient than its formula; or a tensor of the attention is written where autograd "
         "does not see it.", "Detach query, key or value instead; write without .data, .detach() and no_grad, or into a copy."),
    # 5xx: flashfuse's own fault
    Code("FF501", "failure of flashfuse", "flashfuse itself failed at this attention.",
         "Please report it; the attention was compiled as without flashfuse."),
)  # fmt: skip

CATALOGUE: dict[str, Code] = {row.code: row for row in _ROWS}


@dataclass(frozen=True)
class Refusal:
    """One softmax that was left alone.

    `node` is the normal form's node, `where` the user's line (`model.py:131`), `found` what stood there, `reached` the
    way from the softmax to the node where the walk stopped.
    """

    code: str
    anchor: str
    node: str
    found: str
    where: str = ""
    reached: tuple[str, ...] = ()
    safe_for_inductor: bool = False

    @property
    def entry(self) -> Code:
        """This refusal's page in the catalogue."""
        return CATALOGUE[self.code]

    def __str__(self) -> str:
        place = f"{self.where}  " if self.where else ""
        return f"{place}{self.code} {self.entry.title}: {self.found} (at {self.node})"


class Refused(Exception):
    """Raised inside the matcher, at the node where it gives up; turned into a `Refusal` for that softmax."""

    def __init__(self, code: str, node: object, found: str) -> None:
        super().__init__(f"{code} at {node}: {found}")
        assert code in CATALOGUE, code
        self.code = code
        self.node = node
        self.found = found
        self.safe_for_inductor = code == "FF101"  # whether Inductor's own attention matcher may see this softmax
