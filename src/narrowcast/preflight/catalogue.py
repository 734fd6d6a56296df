"""Every rule on the source, in the order of their codes."""

from __future__ import annotations

from narrowcast.preflight.cast_rules import CAST_RULES
from narrowcast.preflight.checkpoint_rules import CHECKPOINT_RULES
from narrowcast.preflight.number_rules import NUMBER_RULES
from narrowcast.preflight.order_rules import ORDER_RULES
from narrowcast.preflight.rule import Rule
from narrowcast.preflight.scaler_rules import SCALER_RULES

__all__ = ["SOURCE_RULES"]

SOURCE_RULES: tuple[Rule, ...] = tuple(
    sorted(
        (*ORDER_RULES, *SCALER_RULES, *CAST_RULES, *NUMBER_RULES, *CHECKPOINT_RULES),
        key=lambda rule: rule.code,
    )
)
