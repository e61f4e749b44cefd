"""Full ranking in chunks, additive ranking metrics, and what every recommender can do."""

from perfedrec.evaluation.ranking import Held, Totals, mask_seen, rank_block
from perfedrec.evaluation.recommender import Recommender, Stored

__all__ = ["Held", "Recommender", "Stored", "Totals", "mask_seen", "rank_block"]
