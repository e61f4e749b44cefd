"""Full ranking in chunks, and additive ranking metrics."""

from perfedrec.evaluation.ranking import Held, Totals, mask_seen, rank_block

__all__ = ["Held", "Totals", "mask_seen", "rank_block"]
