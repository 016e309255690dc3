"""Label smoothing: some of the probability that a label has goes to the whole vocabulary."""

from torch import Tensor

from simreg.baselines import terms
from simreg.baselines.rival import Rival
from simreg.objectives import Reads


class LabelSmoothing(Rival):
    """weight · Σ_t (mean_j −log p_tj − (−log p_ty)), `weight` being ε, from 0 to 1.

    Added to cross-entropy it makes `torch.nn.functional.cross_entropy(label_smoothing=ε)`: a target
    of 1 − ε for the label and of ε / V for every token. The normaliser of the softmax drops out:
    z_ty − mean_j z_tj is left. Negative by itself for an uncertain model; only the sum is bounded.

    Source: Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """

    reads = Reads(logits=True)

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__(weight, highest=1)

    def losses(
        self, hidden: Tensor, labels: Tensor, segments: Tensor | None, *, logits: Tensor
    ) -> Tensor:
        """As `Rival`."""
        wide = terms.seen(logits, labels)
        return terms.pick(wide, labels) - wide.mean(-1)  # 0 where ignored: so is `wide`
