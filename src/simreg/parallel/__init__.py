"""The loss where the tokens of a sequence, or the work on them, are spread over processes."""

from simreg.parallel.loss import ShardedSimRegLoss, sharded_simreg_loss

__all__ = ["ShardedSimRegLoss", "sharded_simreg_loss"]
