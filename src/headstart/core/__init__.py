"""The spine: evidence, statistics, weights, surgery, plans, the one loop, attacks, claims."""
