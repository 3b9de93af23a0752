"""The one door to MLflow: where its store is (`store`), the runs (`runs`), and the model registry (`registry`).

Only the driver writes. Workers leave journals, so no rank and no restart can make a second run, and a metric that is in
MLflow already is not sent again (`delivery`, `system_metrics`). A store that is away is waited for (`patience`).
"""
