"""The paper's central claim: one short post-training run against variants trained end to end, and against its peers."""
