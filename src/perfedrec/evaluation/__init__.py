"""Evaluation: full ranking block by block, ranking metrics that can be added up, and the base of all recommenders."""

from perfedrec.evaluation import metrics
from perfedrec.evaluation.order import RandomOrder
from perfedrec.evaluation.ranking import Held, Totals, mask_seen, rank_block
from perfedrec.evaluation.recommender import Recommender, Stored

__all__ = ["Held", "RandomOrder", "Recommender", "Stored", "Totals", "mask_seen", "metrics", "rank_block"]
