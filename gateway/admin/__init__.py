"""The gateway's side for operators: health, readiness, metrics, fleet, receipts."""
