"""The table of all rules."""

from isthmus.doctor import app_rules, node_rules
from isthmus.doctor.finding import Rule

RULES: tuple[Rule, ...] = (*app_rules.RULES, *node_rules.RULES)
