"""Studies at scale: the statistics of `flow`, `order` and `monitor` on thousands of prompts, and the two papers."""
