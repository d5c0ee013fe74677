"""The mistakes of tests/mutants.py: of each file which tests shall notice, and texts of it with what they become."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    old: str  # occurs once in the file
    new: str
    tests: str | None = None  # other than the file's; files of tests, then perhaps -k and an expression
    equivalent: str | None = None  # why nothing could tell it from the code: it isn't run, and doesn't count


SIDES = [
    Mutant("weighted = x * weight[:, None]", "weighted = x"),
    Mutant("self.xy += weighted.T @ y", "self.xy += x.T @ y"),
    Mutant("(y.square().sum(1) * weight).sum()", "y.square().sum()"),
    Mutant("add_(ridge * self.xx.diagonal().mean())", "add_(ridge)"),
    Mutant("self.yy - 2 * (solution.T", "self.yy - (solution.T"),
    Mutant("x.new_ones(len(x), 1)", "x.new_zeros(len(x), 1)"),
    Mutant("value.shape[-2] == len(solution)", "value.shape[-1] == len(solution)"),
    Mutant("return value + solution[:, -1]", "return value - solution[:, -1]"),
    Mutant("change.T if self.inputs_first else change", "change"),
    Mutant("store(entered + output)", "store(output)"),
    Mutant("if i > layer), default", "if i >= layer), default"),
    Mutant("weight = 1 / target.flatten", "weight = target.flatten"),
    Mutant('["labels"][:, 1:], (0, 1)', '["labels"][:, :-1], (1, 0)'),
    Mutant("torch.where(labels != -100, 1.0, UNLABELLED)", "torch.where(labels == -100, 1.0, UNLABELLED)"),
    Mutant("torch.where(labels != -100, 1.0, UNLABELLED)", "torch.where(labels != -100, 1.0, 1.0)"),
    Mutant(' * self.batches[index]["attention_mask"]', ""),
    Mutant("if fit.left >= fit.before:", "if fit.left > 2 * fit.before:"),
    Mutant("(judge if index in self.judged else fit)", "(fit if index in self.judged else judge)"),
    Mutant("add(x, target - state.flatten(0, -2).float(), weight)", "add(x, target, weight)"),
    Mutant("features[name] / scales[name] for name", "features[name] for name"),
    Mutant("solution[:, :width] / scales", "solution[:, :width] * scales"),
    Mutant("ridge, solution = min(", "ridge, solution = max("),
    Mutant("self.kept.index(layer) + 1, gather, keep=False", "self.kept.index(layer) + 1, gather"),
    Mutant("jump = jump or fit.before", "jump = fit.before"),
]

HEAL = [
    Mutant("if layers == (seam.before,) else 0", "if True else 0"),
    Mutant("if layers == (seam.before,) else 0", "if False else 0"),
    Mutant("* len(differences) ** 0.5", "* 99"),
    Mutant("computed |= changed\n", "computed = changed\n"),
    Mutant("refit.take_back()", "pass"),
    Mutant("                    sides.student = before\n", ""),
    Mutant('record["refitted"] += layers', 'record["refitted"] += [seam.before]'),
    Mutant("sides.row, sides.kept.index(layer), fit)", "sides.row, layer, fit)"),
    Mutant("loss_by_row(model, data.held_out)", "loss_by_row(model, data.fit)"),
    Mutant("if sides is None or sides.stack != seam.stack:", "if sides is None:"),
]

KV_MATH = [
    Mutant("1e-12 * energy.max().clamp_min(1e-30)).sqrt()", "1e-12 * energy.max().clamp_min(1e-30))"),
    Mutant("vectors[..., -1].conj() * root", "vectors[..., -1] * root"),
    Mutant("vectors[..., -1] / root", "vectors[..., -1] * root"),
    Mutant("diagonal(dim1=1, dim2=2).real.mean(1)", "diagonal(dim1=1, dim2=2).real.sum(1)"),
    Mutant("mean / mean.abs(), 1)", "mean.conj() / mean.abs(), 1)"),
    Mutant("values[:, :-1].sum(1)", "values[:, 1:].sum(1)"),
    Mutant("readers.gather(1, order)", "readers"),
    Mutant("decode[heads, order, place] = b", "decode[heads, place, order] = b"),
    Mutant("basis[:, -width:].T @ half, back", "basis[:, :width].T @ half, back"),
    Mutant("covariance.diagonal().sum() / count / power", "covariance.diagonal().sum() / power"),
    Mutant("energy[:-width].sum() * mean", "energy[:-width].sum()"),
    Mutant("(way.amax(1) - way.amin(1))", "(way[:, -1] - way[:, 0])"),
    Mutant("torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi", "angle.diff(dim=1)"),
    Mutant("c.real.diag(), -c.imag.diag()", "c.real.diag(), c.imag.diag()"),
    Mutant("first, second = x.chunk(2, -1)", "first, second = x[..., ::2], x[..., 1::2]"),
    Mutant("return min(partitions(", "return max(partitions("),
    Mutant("total(trial) < total(best) * (1 - 1e-9)", "total(trial) > total(best) * (1 + 1e-9)"),
]

KV_MERGE = [
    Mutant('"tnf,tmf->fnm", pairs, pairs.conj()', '"tnf,tmf->fnm", pairs.conj(), pairs'),
    Mutant("some = some - (mean / mask.sum(1, keepdim=True).clamp_min(1))[row]", "some = some - 0"),
    Mutant("tokens += len(x)", "tokens = len(x)"),
    Mutant(".sum(1) / tokens\n", ".sum(1)\n"),
    Mutant(
        'einsum("ohgd,ohge->hde", columns, columns)',
        'einsum("ohgd,ohge->hde", columns[:, :, :1], columns[:, :, :1])',
    ),
    Mutant("for c in b.conj()]", "for c in b]"),
    Mutant("if apart - lost > LEAST_GAIN * read:", "if apart - lost < LEAST_GAIN * read:"),
    Mutant("view(-1, 2).T.flatten()", "flatten()"),
    Mutant("(cost / cost.sum((1, 2), keepdim=True).clamp_min(1e-30)).sum(0)", "cost.sum(0)"),
    Mutant("scale = mean[:, None] / before.clamp_min(1e-12)", "scale = torch.ones_like(used)"),
    Mutant("missing = total - normal.sum(1)", "missing = normal.sum(1) - total"),
    Mutant("size * (total @ metric / rows / metric).sqrt()", "size / metric.sqrt()"),
    Mutant("norm.weight + gain - old)", "gain)"),
    Mutant("attention.o.in_features // attention.k.out_features", "1"),
    Mutant("value = value[:, back][..., back]", "pass"),
    Mutant("z in (q, gates)], 1)", "z in (gates, q)], 1)"),
    Mutant("maps.gates[place][:, query] = follow[i]", "maps.gates[place][:, query] = follow[i].T"),
]

KV_FIT = [
    Mutant('score_batches(model, [batch])["loss"] * counted', 'score_batches(model, [batch])["loss"]'),
    Mutant("if fit.left < fit.before:", "if fit.left < math.inf:"),
    Mutant("if not after < before:", "if False:"),
    Mutant("p.to(torch.float32, copy=True)", "p.float()"),
    Mutant("(rest / all_of_it).backward()", "(-rest / all_of_it).backward()"),
    Mutant("if index not in sides.judged]", "if index in sides.judged]"),
    Mutant("MADE_UP_KV * (x.to(e.device) - e)", "MADE_UP_KV * (e - x.to(e.device))"),
    Mutant("needed = of_text.kv // plan.kv_heads * of_text.dim", "needed = of_text.dim"),
    Mutant("if missing < best[0]:", "if missing < best[0] or fit_gains is False:"),
    Mutant("len(turn))) <= SLOW", "len(turn))) > SLOW"),
    Mutant(
        '[batch["attention_mask"].to(model.device).bool() for batch in data.fit]',
        '[torch.ones_like(batch["attention_mask"]).bool() for batch in data.fit]',
    ),
    Mutant("loss_behind(sides.teacher, model, held_out)", "loss_behind(sides.student, model, held_out)"),
    Mutant("tokens < needed", "tokens <= needed"),
]

ZEROS_WISH = [
    Mutant("return group - kept, group", "return kept, group"),
    Mutant("if not 0 < kept < group:", "if not 0 < kept <= group:"),
    Mutant("if len(given) != 1:", "if len(given) < 1:"),
    Mutant("not 0 < wish.sparsity < 1:", "not 0 < wish.sparsity <= 1:"),
    Mutant("not 0 < wish.maximum <= 1", "not 0 <= wish.maximum <= 1"),
]

ZEROS_WEIGHTS = [
    Mutant("if wanted.search(name) else None", "if wanted.fullmatch(name) else None"),
    Mutant("if modules and wanted.fullmatch(name)", "if modules and wanted.search(name)"),
    Mutant("if row.inputs_first:\n        return -2", "if row.inputs_first:\n        return -1"),
    Mutant("(shape[-1] == hidden) == reads_hidden", "(shape[-1] == hidden) != reads_hidden"),
    Mutant('"sparsity": count / chosen', '"sparsity": count / statistics(checkpoint)["parameters"]'),
]

ZEROS = [
    Mutant("if inputs % wish.pattern[1]:", "if inputs % wish.pattern[0]:"),
    Mutant("(importance / largest) ** power", "(importance / largest)"),
    Mutant("max(1 - (importance", "max((importance"),
    Mutant("* sizes[i] % 1, reverse=True)", "* sizes[i] % 1)"),
    Mutant("max(low, math.floor(Fraction(str(maximum)) * size))", "math.floor(Fraction(str(maximum)) * size)"),
    Mutant("max(low, min(high, math.floor(share)))", "min(high, math.floor(share))"),
    Mutant("if found[index] < most[index]][:missing]", "][:missing]"),
    Mutant("else (weight.stack, weight.layer)].append", "else (None, weight.layer)].append"),
    Mutant("if group is not None and group not in importance:", "if False:"),
    Mutant("plan.importance.get(group, sum(known) / max(1, len(known)))", "plan.importance.get(group, 0.0)"),
    Mutant("[0.0] * len(names), count, least=least)", "[0.0] * len(names), count)"),
    Mutant("* count + Fraction(1, 2))", "* count)"),
    Mutant('wish.score != "magnitude" and not torch.isfinite', 'wish.score == "magnitude" and not torch.isfinite'),
    Mutant("RowCut(budgets[name], plan.weights[name].inputs)", "RowCut(budgets[name])"),
    Mutant("RowCut(wish.pattern[0], w.inputs, wish.pattern[1])", "RowCut(wish.pattern[0], -1, wish.pattern[1])"),
    Mutant("(cuts[name].mask(k) | (k == 0)).sum()", "cuts[name].mask(k).sum()"),
    Mutant("sum(self.zeros.values()) - self.zeros_before", "sum(self.zeros.values())"),
    Mutant("wish.pattern[1] - wish.pattern[0]", "wish.pattern[0]"),
    Mutant("return values.abs()", "return values", equivalent="sort_keys takes magnitudes"),
]

SPARSE_FIT = [
    Mutant("self.own[expert] += values.T", "self.own[expert] = values.T"),
    Mutant("wanted.T @ values", "values.T @ wanted"),
    Mutant("aim = weight @ wanted_judge", "aim = weight @ own_judge"),
    Mutant("own_judge - 2 * aim)", "own_judge - aim)"),
    Mutant("(weight @ wanted - found @ own) * kept", "(weight @ wanted - found @ own)"),
    Mutant("(weight @ wanted - found @ own)", "(weight @ own - found @ own)"),
    Mutant("through = (along @ own) * kept", "through = along @ own"),
    Mutant("rest = rest - length * through", "rest = rest + length * through"),
    Mutant("ratio(size, before) * along", "ratio(before, size) * along"),
    Mutant("torch.where(left < least, found, best)", "found"),
    Mutant("torch.minimum(left, least)", "left"),
    Mutant("return 1 if plain in row.mixers", "return 2 if plain in row.mixers"),
    Mutant("[tokens].float(), MADE_UP_ZEROS)", "[tokens].float(), 1 - MADE_UP_ZEROS)"),
    Mutant("(judge if index in sides.judged else fit)", "(fit if index in sides.judged else judge)"),
    Mutant("sides.student.step(self.number + 1, keep=False)", "sides.student.step(self.number + 1)"),
    Mutant("torch.where(kept & ((found == 0) | ~torch.isfinite(found)), values, found)", "found"),
    Mutant("for stack, row in reversed(family.stacks.items())", "for stack, row in family.stacks.items()"),
    Mutant("found[0][found[1]].copy_(cut.zeroed(name))", "pass"),
    Mutant(
        'losses["held_out_loss"] = score_batches(model, data.held_out)',
        'losses["held_out_loss"] = score_batches(model, data.fit)',
    ),
]

SPARSE_LORA = [
    Mutant(".masked_fill(zeros, 0)", ""),
    Mutant("return orig_weight + delta", "return orig_weight - delta"),
    Mutant("return orig_weight.data - delta", "return orig_weight.data + delta"),
    Mutant("delta.T if module.fan_in_fan_out else delta", "delta"),
    Mutant("module.lora_variant and not _only_masked(module)", "module.lora_variant"),
    Mutant(" and not _only_masked(module))", " and False)"),
]

SPARSE_FILES = [
    Mutant("return bits[bits != 0].data", "return bits.data"),
    Mutant('count=dense.size, bitorder="little"', "count=dense.size"),
    Mutant("smaller = sum(", "smaller = 0 * sum("),
    Mutant('if len(found) != marked.get("tensors"):', "if False:"),
    Mutant("int(np.bitwise_count(bits).sum()) != math.prod(tensor.shape)", "False"),
    Mutant("if tensors.keys() == checkpoint.tensors.keys():", "if False:"),
    Mutant("stays * (DTYPE_BYTES[tensor.dtype] + CSR_INDEX)", "stays * DTYPE_BYTES[tensor.dtype]"),
    Mutant("max(axis=weight.inputs, keepdims=True)", "max()"),
]

DISTRIBUTIONS = [
    Mutant("flat[flat != 0]", "flat"),
    Mutant("largest <= smallest for", "largest > smallest for"),
    Mutant("(new == 0) & (values != 0)", "(new == 0)"),
    Mutant("stays = values[new != 0].abs()", "stays = values[new == 0].abs()"),
    Mutant("if before.family != after.family:", "if False:"),
    Mutant("if {place[1:] for place in theirs} != first.keys():", "if False:"),
]

SPARSE_TRAINING = [
    Mutant("if parameter.requires_grad and id(parameter) not in embeddings:", "if parameter.requires_grad:"),
    Mutant("if parameter.requires_grad and id(parameter)", "if id(parameter)"),
    Mutant("if parameter.dim() > 1:", "if parameter.dim() > 0:"),
    Mutant("if saved and (saved / MASKS).is_file():", "if False:"),
    Mutant("if not masks and not self.under_lora:", "if False:"),
    Mutant("return gradient.masked_fill(self.masks[name], 0)", "return gradient"),
    Mutant(
        "    def on_optimizer_step(self, args, state, control, **kwargs):\n        self._apply()",
        "    def on_optimizer_step(self, args, state, control, **kwargs):\n        pass",
    ),
    Mutant("self.hooks.pop().remove()", "self.hooks.pop()"),
    Mutant('draft = folder / f".{MASKS}.new"', "draft = folder / MASKS"),
    Mutant("if args.should_save and", "if not args.should_save and"),
    Mutant('if scope == "global" else', 'if scope != "global" else'),
    Mutant("round(sparsity * sum(", "int(sparsity * sum("),
    Mutant("max(wanted, zeros))", "wanted)"),
    Mutant(
        "lowest(weight[active].abs(), count)",
        "lowest(weight[active], count)",
        equivalent="sort_keys takes magnitudes",
    ),
    Mutant("lowest(candidates, len(candidates) - count)", "lowest(candidates, count)"),
    Mutant("candidates = gradient[new].abs()", "candidates = gradient[mask].abs()"),
    Mutant("min(int(share * int(active.sum())), int(mask.sum()))", "int(share * int(active.sum()))"),
    Mutant('if e["step"] < state.global_step]', 'if e["step"] <= state.global_step]'),
    Mutant('if self.history["settings"] != asdict(self.settings):', "if False:"),
    Mutant("value.masked_fill_(mask, 0)\n\n\nclass Gradual", "value.masked_fill_(mask, 1)\n\n\nclass Gradual"),
    Mutant("if self.settings.events > state.max_steps:", "if self.settings.events > state.max_steps + 1:"),
    Mutant("bool(args.greater_is_better) and not", "bool(args.greater_is_better) or not"),
    Mutant("quality >= dense * (1 - worse) if", "quality >= dense * (1 + worse) if"),
    Mutant("else quality <= dense * (1 + worse)", "else quality <= dense * (1 - worse)"),
    Mutant('            events[-1]["retrained"] = before\n', "            pass\n"),
    Mutant(
        "            for name, mask in self.masks.items():\n                self._forget(optimizer, name, mask)\n",
        "",
    ),
    Mutant(
        'if self.history["stopped_before"] and self.history["stopped_before"] >= state.global_step:',
        "if False:",
    ),
    Mutant("if saved:  # what", "if False:  # what"),
    Mutant('"global")\n        return super()', '"layer")\n        return super()'),
    Mutant("return gradient if self.share else super()._mask_gradient(name, gradient)", "return gradient"),
    Mutant("            weight.grad.masked_fill_(new, 0)\n", ""),
    Mutant(
        "            weight.masked_fill_(new, 0)\n",
        "",
        equivalent="they are zeroed after the step, before anything reads them",
    ),
    Mutant("self._forget(optimizer, name, new | mask)", "self._forget(optimizer, name, new & ~new)"),
    Mutant("count += int((new & ~mask).sum())", "count += int(new.sum())"),
]

OCR = [
    Mutant("max(0.0, 1.0 - Levenshtein", "(1.0 - Levenshtein"),
    Mutant(
        "(completion, reference) / max(1, len(reference)))",
        "(completion, reference) / max(1, len(completion)))",
    ),
    Mutant("return float(not completion)", "return 1.0"),
    Mutant("/ len(reference)\n\n\ndef ocr_perfect", "/ len(completion)\n\n\ndef ocr_perfect"),
    Mutant("return float(completion == reference)", "return float(completion in reference)"),
    Mutant("short / long if long else 1.0", "short / long if long else 0.0"),
    Mutant("tolerance * len(reference) / len(completion)", "len(reference) / len(completion)"),
    Mutant("range(len(t) - n + 1)", "range(len(t) - n)"),
    Mutant("count - max(1, true[gram])", "count - 1"),
    Mutant("0.0 - max(overrun,", "0.0 - (overrun +"),
    Mutant("set(map(script_of, filter(str.isalpha, reference)))", "set(map(script_of, reference))"),
    Mutant("zip(completions, solution, strict=True)", "zip(completions, solution)"),
    Mutant('unicodedata.normalize("NFC", text).strip()', "text.strip()"),
    Mutant('unicodedata.normalize("NFC", text).strip()', 'unicodedata.normalize("NFC", text)'),
    Mutant("if reference is None:\n            return None", "if reference is None:\n            return 0.0"),
]

HEAD_RATES = [
    Mutant('Rates.parse(os.environ.get("HEAD_RATES", ""), **PRESETS[name])', "Rates(**PRESETS[name])"),
    Mutant('"others": 0.0, "weak_share"', '"others": 1.0, "weak_share"'),
    Mutant('"others": 0.0, "weak": 0.0', '"others": 1.0, "weak": 0.0'),
    Mutant('"weak": 0.0, "weak_share": 0.5', '"weak": 0.0, "weak_share": 0.0'),
    Mutant("trainer.is_deepspeed_enabled or ", ""),
    Mutant("self.args.tuner_type)", '"full")'),
    Mutant("settings, known_scores(checkpoint), ", "settings, None, "),
    Mutant("if not settings.others:", "if settings.others:"),
    Mutant("        rates.attach(optimizer)\n", ""),
]

KNOCKOUT = [
    Mutant("model = model.get_base_model()", "pass"),
    Mutant("            cut(model, plan)\n", "            pass\n"),
    Mutant("except ValueError as error:", "except KeyError as error:"),
]

SPARSITY_PLUGIN = [
    Mutant('settings_of("gradual_pruning")', 'settings_of("dynamic_sparsity")'),
    Mutant('settings_of("dynamic_sparsity"), trainer', 'settings_of("dynamic_sparsity")'),
]

EXTEND = [
    Mutant("Qwen2VLTemplate.image_token_id = property(lambda template: template.processor.image_token_id)",
           "Qwen2VLTemplate.image_token_id = property(lambda template: template.processor.video_token_id)"),
    Mutant("template.processor.video_token_id", "template.processor.image_token_id"),
    Mutant("            config.n_embd = width  #", "            pass  #"),
    Mutant('if "gpt2" not in MODEL_MAPPING:', 'if "gpt2" in MODEL_MAPPING:'),
]  # fmt: skip

REMOVAL = [
    Mutant('"(text|vision)[:-](.+)"', '"(text|vision)[-](.+)"'),
    Mutant('"(text|vision)[:-](.+)"', '"(text|vision)[:](.+)"'),
    Mutant('"(text|vision)[:-](.+)"', '"(.+)[:-](.+)"'),
    Mutant('"(text|vision)[:-](.+)"', '"(text|vision)[:-](.*)"'),
    Mutant("if not match or any(removal.stack == match[1] for removal in removals):", "if not match:"),
    Mutant('wanted != "none"', "True"),
    Mutant("if removal.stack == s", "if s"),
    Mutant("        plan_without(checkpoint, [removal])\n", "        pass\n"),
    Mutant(r"\d{2,5}", r"\d{1,5}"),
    Mutant("{self.layer:02d}", "{self.layer}"),
]

RANKING = [
    Mutant("    check_ranking(checkpoint, ranking)\n", ""),
    Mutant("None if independent else", "ranking.get('greedy') if independent else"),
    Mutant("relative >= keep_above", "relative > keep_above"),
    Mutant("len(chosen) < max_layers and", ""),
    Mutant("        elif path:\n            break\n", ""),
    Mutant('if name not in before["removed"]:', "if True:"),
    Mutant("if last.layer >= count:", "if last.layer > count:"),
    Mutant("<= max_fraction", "< max_fraction"),
    Mutant("1.0 if share is None else", "0.0 if share is None else"),
    Mutant("max(0.0, 1 - share)", "1 - share"),
    Mutant("scanned if after[None] is None else after", "after if after[None] is None else scanned"),
    Mutant("worst_group(kept) if gate == WORST else None", "None"),
    Mutant("min(known, key=known.__getitem__", "max(known, key=known.__getitem__"),
    Mutant('if scan.get("gate") == WORST:', "if False:"),
    Mutant("if known and not error else None", "if known else None"),
    Mutant("known = after[None] is not None or _cost(scan, entry) is not None", "known = True"),
    Mutant('if trained_baseline and not trained_baseline["error"] else None', "if trained_baseline else None"),
    Mutant('if run and not error and run["token_acc"] is None:', "if False:"),
    Mutant("costs[name])[:count]", "costs[name])"),
    Mutant("key=lambda name: costs[name]", "key=lambda name: -costs[name]"),
    Mutant('if not entry["error"] and (cost', "if (cost"),
    Mutant("if len(points) < 4:", "if len(points) < 3:"),
    Mutant("best - worst <= LEAST_FALL * best", "best - worst <= 0"),
    Mutant("(x - smallest) / (size - smallest)", "x / size"),
    Mutant("heights[bend] >= LEAST_BEND", "heights[bend] > 0"),
    Mutant("bend = max(range(len(points))", "bend = min(range(len(points))"),
    Mutant("None if bend is None else measured[bend]", "bend"),
    Mutant("part / whole if part is not None and whole else None", "whole / part if part and whole else None"),
    Mutant("-value if value is not None and", "value if value is not None and"),
    Mutant('return 0, -entry["relative_trained"]', 'return 0, entry["relative_trained"]'),
    Mutant("return 2, 0.0", "return 0, 0.0"),
    Mutant('scan["counts_suffix"] if scan else True', 'scan["counts_suffix"] if scan else False'),
    Mutant('out / f".{TABLE}.new"', "out / TABLE"),
    Mutant('len(ranking["greedy"]["path"]) > 1', 'len(ranking["greedy"]["path"]) > 0'),
    Mutant("if key not in doubled}", "}"),
]

SCORES = [
    Mutant("return states[:, :-1][counted]", "return states[:, 1:][counted]"),
    Mutant("labels = labels[:, 1:].to", "labels = labels[:, :-1].to"),
    Mutant("counted = labels != -100", "counted = labels > -200"),
    Mutant("counted.nonzero()[:, 0]", "counted.nonzero()[:, 1]"),
    Mutant("torch.tanh(logits / cap) * cap if cap else logits", "logits"),
    Mutant("yield slice(start, start + size)", "yield slice(0, size)"),
    Mutant("logits.argmax(-1) == labels[part]", "logits.argmin(-1) == labels[part]"),
    Mutant('reduction="none"', 'reduction="mean"'),
    Mutant("total += len(found)", "total = len(found)"),
    Mutant('"loss": loss / total', '"loss": loss / right'),
    Mutant('{"token_acc": right / total', '{"token_acc": 1.0'),
]

ANSWERS = [
    Mutant("order[start : start + batch_size]", "order[start : start + batch_size - 1]"),
    Mutant('question_of(each["messages"])})', 'each["messages"]})'),
    Mutant("message.content.strip()", "message.content.upper()"),
    Mutant("np.array([*map(str.__eq__, said, truths)], float)", "ones"),
    Mutant("map(str.__eq__, said, truths)", "map(str.__contains__, truths, said)"),
    Mutant("np.array([*map(Levenshtein.distance, said, truths)], float)", "0 * ones"),
    Mutant("np.array([*map(len, truths)], float)", "np.array([*map(len, answers)], float)"),
    Mutant("weight * np.array([value or", "np.array([value or"),
    Mutant("value or 0.0 for", "value or 1.0 for"),
    Mutant("np.add.at(tokens, places, 1)", "tokens[places] = 1"),
    Mutant("np.array(batch)[rows]", "rows"),
    Mutant("call_reward(guard(orms[name](), name)", "call_reward(orms[name]()"),
]

EVALUATE = [Mutant("datasets[name] = judged.rows", "pass")]

FIGURES = [
    Mutant("np.maximum(below, 1)", "below"),
    Mutant("above.sum(), below.sum()", "above.sum(), len(below)"),
    Mutant("(*before[name], *after[name])", "(*after[name], *before[name])"),
    Mutant("left -= block", "left = 0"),
    Mutant("(1 - LEVEL) / 2, (1 + LEVEL) / 2", "1 - LEVEL, LEVEL"),
    Mutant("if name in after]", "]"),
    Mutant("parts[..., 2], parts[..., 3]", "parts[..., 2], parts[..., 1]"),
]

LINEAGE = [
    Mutant("return entries[starts[0] :]", "return entries"),
    Mutant("if fingerprint(model) == print_of_base:", "if not entries:"),
    Mutant("kept[layer]: number for layer in removed", "layer: number for layer in removed"),
    Mutant("kept[layer]: number for layer in refitted", "layer: number for layer in refitted"),
    Mutant("if layer in kept})", "})"),
    Mutant("None if b is None else kept[b]", "None if b is None else b"),
    Mutant("moves.get(block, block)", "moves.get(block)"),
    Mutant("yield folder.path if fingerprint(folder) == following", "yield folder.path if following"),
]

MEMORY = [
    Mutant("USABLE * size", "size"),
    Mutant("2 * parameters", "parameters"),
    Mutant("min(BATCH_CONTEXT, positions)", "BATCH_CONTEXT"),
    Mutant("max(0, int(USABLE", "max(1, int(USABLE"),
]

TRAINING_RUN = [
    Mutant(
        "except (ValueError, RecursionError):\n                continue",
        "except (ValueError, RecursionError):\n                break",
    ),
    Mutant("if isinstance(record, dict):", "if True:"),
    Mutant("if REAL.holds(v)}", "if isinstance(v, int | float)}"),
    Mutant('if (run / "config.json").exists():', "if False:"),
    Mutant("taken >= wanted and", "True and"),
    Mutant("and Path(str(named)).name == last.name", ""),
]

PUBLISH = [
    Mutant("if not BUFFERS.match(name)}", "}"),
    Mutant("[base.family.tied] if is_tied(base)", "[base.family.tied] if True"),
    Mutant(".shape) != (shape", ".shape) is None != (shape"),
    Mutant("counts.most_common(1)[0][0]", "counts.most_common()[-1][0]"),
    Mutant("base.tensors[twin].dtype if twin and not dtype else common", "common"),
    Mutant("    config[key] = dtype\n", ""),
    Mutant("                part[key] = dtype\n", "                pass\n"),
    Mutant("whole[max(whole)]) else whole[max(whole)])", "whole[max(whole)]) else whole[min(whole)])"),
    Mutant("dtype=arguments.dtype,", "dtype=None,"),
    Mutant("        overwrite=arguments.overwrite,", "        overwrite=True,"),
    Mutant("layers_only=new_head is not None", "layers_only=True"),
    Mutant("fallback=origin.path", "fallback=None"),
    Mutant(
        "history_entry(stage, origin.path, statistics(origin), statistics(result)",
        "history_entry(stage, source.path, statistics(origin), statistics(result)",
    ),
    Mutant(
        "(source_folder / name for name in ADAPTER_FILES)",
        "(source_folder / name for name in ADAPTER_FILES[:1])",
    ),
    Mutant(
        "names = re.compile(base.family.text.prefix if layers_only else",
        "names = re.compile(base.family.text.prefix if not layers_only else",
    ),
]

CUT = [
    Mutant("        cut.source.path,\n", "        cut.result.path.parent,\n"),
    Mutant("        statistics(cut.source),\n", "        statistics(cut.result),\n"),
    Mutant("        statistics(cut.result),\n", "        statistics(cut.source),\n"),
    Mutant("        account.removed,\n", "        None,\n"),
    Mutant(
        "        account.metrics,\n        account.settings,", "        account.settings,\n        account.metrics,"
    ),
    Mutant("    entry |= account.more\n", ""),
    Mutant("entry, overwrite, max_shard_bytes", "entry, True, max_shard_bytes"),
    Mutant("entry, overwrite, max_shard_bytes", "entry, False, max_shard_bytes"),
    Mutant("entry, overwrite, max_shard_bytes", "entry, overwrite"),
    Mutant("write_checkpoint(cut.result", "write_checkpoint(cut.source"),
    Mutant("{key: data", '{"calib": data'),
    Mutant("[data.record]", "[]"),
    Mutant("data.tokens", "len(data.fit)"),
]

KV = [
    Mutant("groups.mean(1)", "groups.sum(1)"),
    Mutant("groups[:, 0]", "groups[:, -1]"),
    Mutant("values.reshape(kv_heads, -1, head_dim", "values.reshape(kv_heads, head_dim, -1"),
    Mutant("if kv_heads == present:", "if False:"),
    Mutant("if kv_heads not in divisors:", "if kv_heads > present:"),
    Mutant("if method not in METHODS:", "if False:"),
    Mutant("old.shape[0] != present * head_dim or", ""),
    Mutant(" or old.dtype not in TORCH_DTYPES", ""),
    Mutant("for name in projections) != 2 * len(layers)", "for name in projections) > 2 * len(layers)"),
    Mutant("copy.deepcopy(checkpoint.config)", "checkpoint.config"),
    Mutant("for part in configs(config, row):\n", "for part in configs(config, row)[:1]:\n"),
    Mutant("Outline(checkpoint.path, config, shapes)", "replace(checkpoint, config=config)"),
    Mutant("heads(plan.source).kv - plan.kv_heads", "plan.kv_heads"),
    Mutant(r"\.(?:weight|bias)", r"\.weight"),
    Mutant(", source.tensors[name].dtype, name)", ', "F32", name)'),
]

WIDTH = [
    Mutant("for n in sizes} - {count})", "for n in sizes})"),
    Mutant("abs(n / count - share) < 0.005", "abs(n / count - share) < 0.5"),
    Mutant("if not 0 < kept[key] < width:", "if not 0 < kept[key] <= width:"),
    Mutant("max(step, round(", "max(0, round("),
    Mutant("round(width * share / step) * step", "int(width * share / step) * step"),
    Mutant("(-scores).argsort", "scores.argsort"),
    Mutant("groups.sum(1)", "groups[:, 0]"),
    Mutant(".repeat(count // kv_count, 0)", "[list(range(kv_count)) * (count // kv_count)]"),
    Mutant("np.sqrt(squares).prod(0)", "np.sqrt(squares).sum(0)"),
    Mutant("for head in range(before.query) if head not in", "for head in range(before.query) if head in"),
    Mutant("before.query - plan.heads.query", "plan.heads.query - 1"),
    Mutant("if not plan.heads_masked and plan.heads.kv", "if plan.heads.kv"),
    Mutant("widths[key] - number", "number"),
    Mutant("copy.deepcopy(checkpoint.config)", "checkpoint.config"),
    Mutant("number * where.unit(heads(checkpoint).dim) * where.halves", "number * where.unit(heads(checkpoint).dim)"),
    Mutant("shape=plan.outline.tensors[name].shape, ", ""),
    Mutant("shapes[name] = replace(shapes[name], shape=tuple(shape))", "pass"),
    Mutant("[: (number - 1) * len(rows)]", "[: number * len(rows)]"),
    Mutant("int(np.argmax(row)) for", "0 * len(row) for"),
]

TEXTS = [
    Mutant("if len(block) > 1]", "if len(block) > 0]"),
    Mutant('row["messages"][-1:]', 'row["messages"]'),
    Mutant("[IGNORED, *block[1:]]", "block"),
]

FIT_TESTS = "tests/surgery/test_layers_fit.py -k not (qwen2 or tral or moe or script or refused or named or become)"
KV_TESTS = (
    "tests/surgery/test_kv_math.py tests/surgery/test_kv_merge.py tests/surgery/test_kv_fit.py "
    "tests/surgery/test_hybrid.py "
    "-k not (tral or qwen2_vl or qwen2_5 or qwen3_vl or moe or script or "
    "gpt2 or bert or disk or generation or averaged or merging)"
)
ZEROS_TESTS = (
    "tests/surgery/test_zeros_pick.py tests/surgery/test_zeros_wish.py tests/surgery/test_zeros_weights.py "
    "tests/surgery/test_zeros_scores.py tests/surgery/test_zeros.py tests/surgery/test_sparsify.py "
    "-k not (script or dry_run or less_than or pictures or qwen2 or tral or bert or vl or gemma3)"
)

REWARD_CALLS = [
    Mutant("if inspect.iscoroutine(found):", "if False:"),
    Mutant("if len(values) != len(completions):", "if len(values) < len(completions):"),
    Mutant("not abs(value) <= LARGEST]", "value != value]"),
    Mutant("value[number : number + 1] if", "value[:1] if"),
    Mutant("values.append(None)", "values.append(0.0)"),
    Mutant("self.failed += len(problems)", "self.failed = len(problems)"),
    Mutant("len(problems) == len(completions) and not", "not"),
    Mutant("and not self._began and step == 0", "and not self._began"),
    Mutant("        self._warned = True\n", ""),
    Mutant("failed, self.failed = self.failed, 0", "failed, self.failed = self.failed, self.failed"),
    Mutant("(GuardedAsyncReward if waits else", "(GuardedReward if waits else"),
]

TRYOUT = [
    Mutant("np.array(list(self.weights.values())) @", "np.ones(len(self.weights)) @"),
    Mutant("if truth.strip() != truths[number].strip())", "if truth)"),
    Mutant("max(1, round(share * len(places)))", "max(1, round(share * len(places) / 2))"),
    Mutant("if letter != characters[place]] or", "if letter] or"),
    Mutant("if finding not in self.tryout.findings:", "if True:"),
    Mutant("            self._applicable(right)\n", ""),
    Mutant("            self._constant(right)\n", ""),
    Mutant("            self._direction(right)\n", ""),
    Mutant("if not _equal(first, again):", "if False:"),
    Mutant("if _equal(first, alone):", "if True:"),
    Mutant("if _equal(first, self._by_first(picked)):", "if False:"),
    Mutant("if not _equal(first[::-1], turned)", "if not _equal(first, turned)"),
    Mutant("total[row] >= truth[row] - SAME]", "total[row] > truth[row]]"),
    Mutant("and kind not in LENIENT or", "or"),
    Mutant("if said.strip() != truths[row].strip()]", "if said]"),
    Mutant("[number // generations for number", "[number % generations for number"),
    Mutant("fault=flat == 1", "fault=False"),
    Mutant(".reshape(-1, generations), axis=1)", ".reshape(generations, -1), axis=0)"),
    Mutant(">= ALIKE:", "> 1:"),
]

CHOICE = [
    Mutant("min(saved[unit], wish) / wish", "saved[unit] / wish"),
    Mutant('saved["params"] <= most', 'saved["params"] <= 2 * most'),
    Mutant("if kind != each.kind), each]", "), each]"),
    Mutant("steps.append(((cost - spent) / more, ", "steps.append((cost - spent, "),
    Mutant("and cost < failed", ""),
    Mutant("if step[3] <= most_loss", ""),
    Mutant("if not within and steps and not chosen:", "if False:"),
    Mutant("key=lambda step: (step[3], step[1])", "key=lambda step: step[:2]"),
    Mutant("return room * cost / lost", "return room * lost / cost"),
    Mutant("if cost > 0 and lost > 0", "if lost"),
    Mutant("if chosen and rate > dear", "if rate > dear"),
    Mutant("dear * max(LITTLE, ", "9999 * max(LITTLE, "),
    Mutant("key=lambda each: KINDS.index(each.kind)", "key=lambda each: each.name"),
    Mutant("return most * (NEAR + (1 - NEAR) * room) / 2**failed", "return most * room / 2**failed"),
    Mutant("/ 2**failed", "/ 1"),
    Mutant('(1 - base, 1 - now) if metric == "cer"', '(base, now) if metric == "cer"'),
    Mutant("math.exp(min(base - now", "math.exp(min(now - base"),
    Mutant("if before <= 0:", "if before < 0:"),
    Mutant('if not wanted.keys().isdisjoint(("kv", "speed")):', "if False:"),
    Mutant('{"speed": 1 / speed}', '{"speed": speed}'),
    Mutant("if numbers[unit] > target", "if numbers[unit] >= target"),
]

TIMING = [
    Mutant("self.scale * share / self.of(model)", "share / self.of(model)"),
    Mutant("return self.scale * sum(", "return sum("),
    Mutant("/ max(self.base[part], 1)", ""),
    Mutant("_seconds(model, of) / _seconds(base, of)", "_seconds(base, of) / _seconds(model, of)"),
    Mutant('LAYERS = ("attention", "mlp", "layers")', 'LAYERS = ("attention", "mlp")'),
    Mutant('if "error" in row or', "if"),
    Mutant("if not parts:", "if False:"),
]

ATOMIC = [
    Mutant(
        "isinstance(value, float) and not math.isfinite(value)",
        "isinstance(value, float) and math.isnan(value)",
    ),
]

FILES: dict[str, tuple[str, list[Mutant]]] = {
    "prunekit/surgery/sides.py": (f"tests/surgery/test_sides.py {FIT_TESTS}", SIDES),
    "prunekit/surgery/layers_fit.py": (FIT_TESTS, HEAL),
    "prunekit/surgery/cut.py": ("tests/surgery/test_cut.py", CUT),
    "prunekit/surgery/kv.py": ("tests/surgery/test_kv.py tests/surgery/test_cut.py -k not (vl or moe or tral)", KV),
    "prunekit/surgery/width.py": (
        "tests/surgery/test_cut.py tests/surgery/test_width.py "
        "-k not (script or measured or refit or encoders or vision or qwen2 or tral or bert or vl)",
        WIDTH,
    ),
    "prunekit/surgery/kv_math.py": (KV_TESTS, KV_MATH),
    "prunekit/surgery/kv_merge.py": (KV_TESTS, KV_MERGE),
    "prunekit/surgery/kv_fit.py": (KV_TESTS, KV_FIT),
    "prunekit/surgery/zeros.py": (ZEROS_TESTS, ZEROS),
    "prunekit/surgery/zeros_weights.py": (ZEROS_TESTS, ZEROS_WEIGHTS),
    "prunekit/surgery/zeros_wish.py": (ZEROS_TESTS, ZEROS_WISH),
    "prunekit/surgery/zeros_fit.py": (
        "tests/surgery/test_zeros_fit.py -k not (distilbert or bert or gemma3 or script or data)",
        SPARSE_FIT,
    ),
    "prunekit/training/zeros.py": (
        "tests/training/test_zeros.py tests/training/test_zeros_settings.py tests/training/test_zeros_gradual.py "
        "tests/training/test_zeros_dynamic.py",
        SPARSE_TRAINING,
    ),
    "prunekit/data/rewards.py": ("tests/data/test_rewards.py", REWARD_CALLS),
    "prunekit/training/reward_tryout.py": (
        "tests/training/test_reward_tryout.py -k not (code or line or mend or own_answers or ocr)",
        TRYOUT,
    ),
    "prunekit/knockout/removal.py": ("tests/knockout/test_removal.py", REMOVAL),
    "prunekit/knockout/ranking.py": (
        "tests/knockout/test_ranking.py tests/knockout/test_ranking_choice.py tests/knockout/test_ranking_files.py "
        "-k not (wandb or script)",
        RANKING,
    ),
    "prunekit/checkpoint/atomic.py": ("tests/knockout/test_ranking.py", ATOMIC),
    "prunekit/training/zeros_lora.py": ("tests/training/test_zeros_lora.py", SPARSE_LORA),
    "prunekit/surgery/zeros_files.py": ("tests/surgery/test_zeros_files.py", SPARSE_FILES),
    "prunekit/report/distributions.py": ("tests/report/test_distributions.py -k not command", DISTRIBUTIONS),
    "prunekit/checkpoint/training_run.py": ("tests/training/test_publish.py", TRAINING_RUN),
    "prunekit/training/publish.py": ("tests/training/test_publish.py", PUBLISH),
    "prunekit/model/scores.py": ("tests/test_evaluate.py -k not (taken or none_of or calibrate)", SCORES),
    "prunekit/data/answers.py": (
        "tests/data/test_answers.py tests/test_evaluate.py -k not (taken or none_of or calibrate)",
        ANSWERS,
    ),
    "prunekit/data/figures.py": ("tests/data/test_figures.py", FIGURES),
    "prunekit/checkpoint/lineage.py": ("tests/checkpoint/test_lineage.py", LINEAGE),
    "prunekit/serving/memory.py": ("tests/serving/test_speed.py -k fit", MEMORY),
    "prunekit/evaluate.py": ("tests/test_evaluate.py -k next_models", EVALUATE),
    "plugins/ocr_rewards.py": ("tests/plugins/test_ocr_rewards.py", OCR),
    "prunekit/training/head_rates_optimizer.py": ("tests/plugins/test_plugins.py", HEAD_RATES),
    "prunekit/training/texts.py": ("tests/training/test_texts.py", TEXTS),
    "prunekit/knockout/callback.py": ("tests/plugins/test_plugins.py", KNOCKOUT),
    "plugins/sparsity.py": ("tests/plugins/test_plugins.py", SPARSITY_PLUGIN),
    "prunekit/loop/choice.py": ("tests/loop/test_choice.py", CHOICE),
    "prunekit/loop/timing.py": ("tests/loop/test_timing.py", TIMING),
    "prunekit/msswift/extend.py": (
        "tests/plugins/test_plugins.py tests/test_evaluate.py -k ids_of or known or exact",
        EXTEND,
    ),
}  # fmt: skip
