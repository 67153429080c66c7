"""The classes that lmms-eval loads; `queries.py` and `responses.py` do the work without it."""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from vlm_jax.config import ConfigError
from vlm_jax.infer.lmms_eval import responses
from vlm_jax.infer.lmms_eval.queries import Query, chat_query, simple_query


class SimpleVlmJax(lmms):
    """A run, a public checkpoint or a model in memory, for tasks in lmms-eval's simple form.

    lmms-eval asks for this form with --force_simple. Tasks with `output_type: multiple_choice` or
    `loglikelihood` need it.
    """

    is_simple = True
    read_query = staticmethod(simple_query)

    def __init__(
        self,
        workdir: str | None = None,
        checkpoint: str | None = None,
        adapter: str | None = None,
        step: str | int | None = None,
        intermediate_layers: str | None = None,
        model: tuple | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model; `--model_args workdir=runs/mine` are the arguments.

        Args:
          workdir: of a run.
          checkpoint: folder of a public checkpoint.
          adapter, intermediate_layers: as of `vlm_jax.from_pretrained`.
          step: as of `vlm_jax.from_run`.
          model: instead of a folder, (model, params, processor) of `vlm_jax.from_run` or
            `from_pretrained`.
          max_new_tokens: most tokens of an answer to a task that states none; None:
            `eval.max_new_tokens` of a run, 256 of a checkpoint.
          batch_size: number of requests in a batch.
          max_batch_size, device: are of other models of lmms-eval, and must be None.

        Raises:
          UserError: an argument is missing or out of range, or the folder cannot be loaded.
        """
        super().__init__()
        if max_batch_size is not None or device is not None:
            raise ConfigError(
                "vlm_jax has no max_batch_size and no device: set batch_size, and choose devices "
                "by JAX's own variables, such as JAX_PLATFORMS."
            )
        if model is None:
            model = responses.load_model(workdir, checkpoint, adapter, step, intermediate_layers)
        self._responder = responses.make_responder(model, batch_size, max_new_tokens)

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        # lmms-eval sets `task_dict` before it sends requests.
        return self.task_dict[task][split][doc_id]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Returns the answer to each request, up to a text of `until`."""
        return self._responder.answer(self._queries(requests))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Returns the answers of all rounds of each request."""
        return self._responder.answer_rounds(self._queries(requests))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Returns (negative log-likelihood in nats, whether it is the greedy answer) of each text.

        Despite the name, lmms-eval's own models return a loss, and its tasks choose the lowest
        (`process_results` in its `api/task.py`; issue 370). Bare pairs would become texts in
        `unwrap_generation_output` of 0.7.3.
        """
        arguments = [request.args for request in requests]
        results = []
        for log_likelihood, is_greedy in self._responder.score(arguments, self._document):
            results.append(GenerationResult((-log_likelihood, is_greedy)))
        return results

    def _queries(self, requests: Sequence[Instance]) -> list[Query]:
        return [self.read_query(request.args, self._document) for request in requests]


class ChatVlmJax(SimpleVlmJax):
    """The same in lmms-eval's chat form, its default."""

    is_simple = False
    read_query = staticmethod(chat_query)
