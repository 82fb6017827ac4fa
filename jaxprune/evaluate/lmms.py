"""The model that lmms-eval runs; needs lmms-eval, which finds it by `plugin.py`."""

import statistics
import time
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from jaxprune.engine.answer import Answer
from jaxprune.errors import UserError
from jaxprune.evaluate.plugin import method_of, request_of
from jaxprune.generate import generate_many
from jaxprune.methods.resolve import check_names
from jaxprune.model import load


class JaxPrune(lmms):  # type: ignore[misc]  # lmms-eval, not installed here, has no types
    """A LLaVA of jaxprune as a chat model of lmms-eval, for every task that generates.

    Args:
        pretrained: the model's directory; without it, the small model that ships.
        method: a pruning method, or a pair with a plus sign between.
        batch_size: prompts that run together.
        device: not used; JAX takes the accelerator that there is.
        dtype, vision_tower, text_tower, adapter, download: as for `jaxprune.load`.
        **options: of the method.

    Raises:
        UserError: for an unknown method or option, before the model is loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        method: Any = "none",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        vision_tower: str | None = None,
        text_tower: str | None = None,
        adapter: str | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        del device
        options.pop("max_batch_size", None)
        self.pruning = {"method": method_of(method), **options}
        check_names(**self.pruning)
        self.batch_size = int(batch_size)
        self.params = load(
            pretrained,
            dtype=dtype,
            vision_tower=vision_tower,
            text_tower=text_tower,
            adapter=adapter,
            download=download,
        )

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer a task's questions, in their order.

        Raises:
            UserError: for the first that cannot be answered, with its task and document: an
                empty answer in its place would count as a wrong one.
        """
        began = time.perf_counter()
        asked = (self._asked(request.args) for request in requests)
        found = generate_many(
            self.params,
            asked,
            batch_size=self.batch_size,
            return_details=True,
            return_errors=True,
            **self.pruning,
        )
        results, spent = [], []
        for answer, request in zip(found, requests, strict=True):
            if isinstance(answer, UserError):
                raise UserError(f"{_where(request.args)}: {answer}")
            counts = TokenCounts(
                input_tokens=answer.prompt_tokens, output_tokens=len(answer.token_ids)
            )
            results.append(GenerationResult(text=answer.text, token_counts=counts))
            spent.append(_costs(answer))
        tokens = sum(result.token_counts.output_tokens for result in results)
        seconds = time.perf_counter() - began
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds,
            additional_metrics=_summed_up(spent),
        )
        return results

    def _asked(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        _, messages_of, options, place, task, split = arguments
        try:
            return request_of(messages_of(self.task_dict[task][split][place]), options)
        except UserError as error:
            raise UserError(f"{_where(arguments)}: {error}") from None

    # lmms-eval's class has these two abstract; it says so for the tasks that ask for them.

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: there are answers here, and no likelihoods of given ones."""
        raise NotImplementedError(
            "jaxprune generates answers; choose the generative form of this task."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Refused: a later round's question would depend on the answer before."""
        raise NotImplementedError("jaxprune answers one question at a time, not in rounds.")


def _where(arguments: tuple[Any, ...]) -> str:
    *_, place, task, _ = arguments
    return f"Task {task}, document {place}"


def _costs(answer: Answer) -> dict[str, float]:
    """What an answer cost; the seconds are of its batch."""
    cost = answer.cost
    stages = ("encode", "select", "prefill")
    return {
        "visual_tokens": cost.visual_per_layer,
        "macs": cost.macs,
        "unpruned_macs": (cost.unpruned or cost).macs,
        "first": sum(answer.seconds.get(stage, 0.0) for stage in stages),
    }


def _summed_up(spent: list[dict[str, float]]) -> dict[str, float]:
    """What stands in the report as `avg_<name>`."""
    if not spent:
        return {}
    of = {name: [own[name] for own in spent] for name in spent[0]}
    return {
        "visual_tokens": statistics.fmean(of["visual_tokens"]),
        "gflops": 2e-9 * statistics.fmean(of["macs"]),
        "flops_saved": 1 - sum(of["macs"]) / max(1, sum(of["unpruned_macs"])),
        "first_token_seconds_of_a_batch": statistics.median(of["first"]),
    }
