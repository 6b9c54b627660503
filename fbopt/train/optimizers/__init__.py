"""Update rules that torch does not have, and the optimizer of a run from its options."""
