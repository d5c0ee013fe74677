"""What a scan and trainings may have come to, for rankings."""

NAN = float("nan")


def removal(layer, token_acc, loss=None, error=None, stack="text", **values):
    loss = 1 - token_acc if loss is None and token_acc is not None else loss
    return {
        "name": f"{stack}-{layer:02d}", "stack": stack, "layer": layer, "parameters": 90, "parameters_saved": 10,
        "latency_saved": 0.1, "token_acc": token_acc, "loss": loss, "kl": loss, "block_influence": 0.5,
        "standard_error": {"token_acc": 0.01, "loss": 0.02, "kl": 0.03}, "samples": 4, "decided": True,
        "generation": None, "error": error,
    } | values  # fmt: skip


def fewer(number, token_acc, **values):
    return removal(0, token_acc, **values) | {"name": f"experts-{number:02d}", "stack": "experts", "layer": None,
                                              "experts": number}  # fmt: skip


def scan(*removals, predictor="loss", greedy=None):
    baseline = {"token_acc": 0.8, "loss": 0.2, "samples": 4, "tokens": 40, "parameters": 100}
    return {
        "predictor": predictor, "counts_suffix": True, "baseline": baseline, "removals": list(removals),
        "greedy": greedy,
    }  # fmt: skip


def run(name, token_acc, error=None):
    stack, layer = (None, None) if name == "baseline" else (name.split("-")[0], int(name.split("-")[1]))
    return {
        "name": name, "stack": stack, "layer": layer, "parameters": 90, "token_acc": token_acc, "loss": 0.3,
        "curve": [{"step": 1, "token_acc": token_acc, "loss": 0.3}], "training": [{"step": 1, "loss": 0.3}],
        "error": error, "seconds": 1.0,
    }  # fmt: skip


def path(*accs, healed=False):
    points = [
        {
            "removed": [f"text-{layer:02d}" for layer in range(count)], "parameters": 100 - 10 * count,
            "token_acc": acc, "loss": 0.2, "kl": 0.1, "generation": None,
        }
        for count, acc in enumerate(accs)
    ]  # fmt: skip
    return {"healed": healed, "criterion": "loss", "path": points}
