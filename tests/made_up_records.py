"""Records of runs that nobody ran, for what makes tables of them."""

T = 100  # steps; what counts comes after step 50


def record(method="lora", seed=0, score=0.5, status="completed", **parameters) -> dict:
    """A record with the evaluations at steps 50 (does not count) and 100; score None: only NaN."""
    more = parameters.pop("extras", [{}, {}])
    evaluations = [
        {"step": step, "epoch": step // 50, "metric": metric, "collapsed": False, **extra}
        for step, metric, extra in zip((50, T), (0.9, score), more, strict=True)
    ]
    evaluations = evaluations if score is not None else []
    given = {"task": "cola", "method": method, "seed": seed, "learning_rate": 1e-3, "init_r": 3}
    return {
        "status": status,
        "best": score,
        "best_ever": 0.9 if evaluations else None,
        "last": score,
        "evaluations": evaluations,
        "metric_name": "matthews",
        "trainable_parameters": {"adapter": 300, "head": 20},
        "total_steps": T,
        "steps": T,
        "seconds": 60.0,
        "evaluation_seconds": 10.0,
        "peak_memory_mib": 1234,
        "environment": {"device": "NVIDIA H100"},
        "data": {"fingerprint": "d"},
        "model": {"sha256": "m"},
        "parameters": given | {"target_r": 2, "score": "abs_c"} | parameters,
    }


def five(method: str, scores: list[float], **parameters) -> list[dict]:
    return [record(method, seed, score, **parameters) for seed, score in enumerate(scores)]
