"""
What student and teacher must agree on: the meaning of every token id the student can emit, of images, and the length.
Where ids differ, `by_text.py` takes its place.

A teacher and a student are compared once, before training ([`TokenContract.between`]); prompts of a dataset and
rollouts are held against what came out.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..alignment import Alignment
from .teacher import Teacher, TokenScores


logger = get_logger(__name__)

PROMPTS_TO_MEASURE = 10_000  # within a second


class TokenContract:
    """
    What a teacher can read of a student's prompts and completions, and what it can name to it.

    Args:
        teacher ([`Teacher`]):
            Its vocabulary and its positions bound what it can read.
        unknown_ids, nameable_ids (`Collection[int]`, *optional*):
            Token ids that it isn't to score, see [`find_unknown_ids`] and [`find_unfit_ends`], and those that it may
            name: of what both know, neither these nor an end of its turn on which the student doesn't stop.
        image_problem (`str`, *optional*):
            Why it can't read the student's images, see [`find_image_problem`].
    """

    by_text = False  # whether it is given the text in the place of the student's token ids

    def __init__(
        self,
        teacher: Teacher,
        unknown_ids: Collection[int] = (),
        nameable_ids: Collection[int] = (),
        image_problem: str | None = None,
    ):
        self.teacher, self.image_problem = teacher, image_problem
        self.unknown_ids = torch.tensor(sorted(unknown_ids), dtype=torch.long)
        self._is_nameable = torch.zeros(teacher.vocab_size, dtype=torch.bool)
        self._is_nameable[torch.tensor(sorted(nameable_ids), dtype=torch.long)] = True

    @classmethod
    def between(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
        eos_token_ids: Collection[int],
        processor: ProcessorMixin | None = None,
    ) -> "TokenContract | None":
        """Compare a student, by its tokenizer, the ids that end its completions and, if it reads images, its
        processor, with a teacher. `None` if that gives the student's ids another meaning. Raises a `ValueError` if it
        has no rows for them."""
        ends, other_ends = set(eos_token_ids), teacher.eos_token_ids - set(eos_token_ids)
        unknown_ids = find_unknown_ids(tokenizer, teacher.tokenizer)
        if unknown_ids is None:
            return None
        unknown_ids = sorted({*unknown_ids, *find_unfit_ends(ends, teacher.eos_token_ids)})
        highest = max(tokenizer.get_vocab().values())
        if highest >= teacher.vocab_size:
            raise ValueError(_beyond_vocabulary("The student's tokenizer goes up to", highest, teacher))
        if unknown_ids:
            examples = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(unknown_ids[:5])))
            logger.warning(
                f"The teacher doesn't score {len(unknown_ids)} of the student's tokens, which it doesn't know or "
                f"doesn't end its turn with (such as {examples}): there the likelihood ratio is GRPO's."
            )
        if other_ends:
            names = ", ".join(map(repr, teacher.tokenizer.convert_ids_to_tokens(sorted(other_ends))))
            logger.warning(
                f"The teacher may end its turn with {names}, on which the student doesn't stop. So it isn't asked "
                "where the student ends its own. If the student is to end as the teacher does, add the token to "
                "`generation_config.eos_token_id` of the student."
            )
        problem = None if processor is None else teacher.find_image_problem(processor)
        nameable_ids = set(tokenizer.get_vocab().values()) & set(teacher.tokenizer.get_vocab().values())
        nameable_ids -= {*unknown_ids, *other_ends}
        return cls(teacher, unknown_ids, nameable_ids, problem)

    def is_known(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens of the student the teacher can score, bool, of the shape of `ids`."""
        return ~torch.isin(ids, self.unknown_ids.to(ids.device))

    def can_be_named(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens of the teacher mean the same to the student, bool, of the shape of `ids`."""
        return self._is_nameable.to(ids.device)[ids]

    def read(self, prompt: Any, completion: torch.Tensor, wanted: torch.Tensor):
        """
        What the teacher is given for a row of the student's.

        Args:
            prompt (`Sequence[int]`), completion (`torch.Tensor` of shape `(T,)`), wanted (`torch.Tensor`, same shape):
                Token ids, and where a score is wanted, bool.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor, Alignment | None]`: token ids of the prompt and the
            completion, the tokens of this completion whose scores are needed, and what `to_student` takes.
        """
        return torch.as_tensor(prompt, dtype=torch.long), completion, wanted & self.is_known(completion), None

    def to_student(self, scores: TokenScores, alignment: Alignment | None) -> TokenScores:
        """The scores in the student's tokens: one that can't be named has a log-probability of `-inf`."""
        can_be_named = self.can_be_named(scores.top_ids)
        top_logps = scores.top_logps.masked_fill(~can_be_named, -float("inf"))
        return TokenScores(scores.logps, scores.top_ids.where(can_be_named, 0), top_logps)

    def check_dataset(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, max_completion_length: int | None):
        """Raises a `ValueError` if the teacher can't read the longest prompts of training data, with a completion, or
        its images. Rollouts are checked too. A stream isn't looked at: it may be slow, or move on."""
        columns = set(getattr(dataset, "column_names", None) or ())
        prompts = []
        if isinstance(dataset, Dataset):
            texts = dataset.select_columns(sorted({"prompt", "teacher_prompt"} & columns))[:PROMPTS_TO_MEASURE]
            prompts = [prompt for column in texts.values() for prompt in column if prompt]
        prompt_length = longest_prompt(prompts, tokenizer)
        if prompt_length + (max_completion_length or 0) > self.teacher.max_length:
            raise ValueError(
                f"Prompts of {prompt_length} tokens and completions of up to {max_completion_length} are too long for "
                f"the teacher {self.teacher.name}, which knows {self.teacher.max_length:.0f} positions. "
                f"{self._length_remedy}"
            )
        if self.image_problem and columns & {"image", "images"} and "teacher_weight" not in columns:
            raise ValueError(self._image_message)

    def check(self, rows: Sequence):
        """Raises a `ValueError` if a [`~trl_rlad.scoring.rows.Row`] has a token id beyond the teacher's vocabulary, is
        longer than its positions, has no prompt, or has images that it can't read."""
        if not all(len(row.prompt) for row in rows):
            raise ValueError(
                "The prompt of a row, or its `teacher_prompt`, has no tokens, so there is nothing from which a "
                "teacher could tell the first token of the completion."
            )
        longest = max(map(len, rows), default=0)
        if longest > self.teacher.max_length:
            raise ValueError(
                f"A rollout has {longest} tokens with its prompt, but the teacher {self.teacher.name} knows only "
                f"{self.teacher.max_length:.0f} positions. {self._length_remedy}"
            )
        highest = torch.cat([ids for row in rows for ids in (row.prompt, row.completion)]).max().item() if rows else 0
        if highest >= self.teacher.vocab_size:
            raise ValueError(
                f"{_beyond_vocabulary('A rollout has the', highest, self.teacher)} If it is the student that emits "
                "it, "
                '`generation_kwargs={"suppress_tokens": [...]}` keeps it from doing so.'
            )
        if self.image_problem and any(row.images for row in rows):
            raise ValueError(self._image_message)

    @property
    def _length_remedy(self):
        return (
            "Lower `max_completion_length`, leave out longer prompts, choose a `teacher_model` for longer texts or "
            f"{self.teacher.length_remedy}."
        )

    @property
    def _image_message(self):
        return (
            f"The teacher {self.teacher.name} can't read the images of this data: {self.image_problem}. Choose a "
            "`teacher_model` of the student's family, or give the rows with images the `teacher_weight` 0, which "
            "trains them with GRPO."
        )


def _beyond_vocabulary(what, id, teacher):
    return (
        f"{what} token id {id}, but the teacher's vocabulary has only {teacher.vocab_size} rows. Choose a "
        "`teacher_model` that knows all of the student's tokens."
    )


def find_unknown_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[int] | None:
    """
    Ids that the student can emit and that mean nothing to the teacher: those that its tokenizer doesn't have, and the
    special tokens that it calls otherwise. Different sizes of padded vocabularies don't matter.

    `None` if ordinary ids stand for different tokens, or the teacher doesn't know most of them.
    """
    student_tokens = {id: token for token, id in student.get_vocab().items()}
    teacher_tokens = {id: token for token, id in teacher.get_vocab().items()}
    conflicts = {id for id, token in student_tokens.items() if teacher_tokens.get(id, token) != token}
    unknown = student_tokens.keys() - teacher_tokens.keys()
    # Reserved tokens that one of the two has given a name are no reason to refuse a whole family of models
    unknown |= conflicts & student.added_tokens_decoder.keys() & teacher.added_tokens_decoder.keys()
    if conflicts - unknown or 2 * len(unknown) > len(student_tokens):
        return None
    return sorted(unknown)


def find_ends(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids on which a model ends its turn, as TRL finds those of the student: of its generation config, which may have
    several (Gemma's `<eos>` and `<end_of_turn>`, say), and of its tokenizer."""
    ids = generation_config.eos_token_id
    return {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}


def find_unfit_ends(student: set[int], teacher: set[int]) -> set[int]:
    """
    Of the ids that end the student's turn, those whose probability under the teacher doesn't tell whether the turn is
    to end there.

    These are the ones that don't end the teacher's turn and, if the teacher has an end on which the student doesn't
    stop, all of them: that may be the one it uses (a base model with `<|endoftext|>`, say, and an instruct model that
    lists it beside its `<|im_end|>`).
    """
    return student - teacher if teacher <= student else student


def text_of(content: str | list[dict] | None) -> str:
    """The text of a message's content, which may be a list of parts."""
    return content or "" if not isinstance(content, list) else " ".join(part.get("text") or "" for part in content)


def longest_prompt(prompts: Sequence[str | list[dict]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of about the longest prompt, without what a chat template adds: of those with the most
    characters. Of chat messages only the text counts."""

    def text_of_prompt(prompt):
        return prompt if isinstance(prompt, str) else " ".join(text_of(message["content"]) for message in prompt)

    texts = sorted(map(text_of_prompt, prompts), key=len)[-8:]
    return max(map(len, tokenizer(texts)["input_ids"])) if texts else 0


def find_image_problem(student: ProcessorMixin, teacher: ProcessorMixin) -> str | None:
    """
    Why the teacher can't read the images that the student's processor has prepared, or `None` if it can.

    The teacher is given the student's tensors, among the student's placeholder tokens. So its own processor must make
    the same of an image: its size, patches and normalization, the number of placeholders and their token ids.
    """
    from PIL import Image  # which is there where there are processors of images

    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]

    def read(processor):
        return processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            chat_template=student.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    expected, inputs = read(student), read(teacher)
    different = sorted(
        name
        for name in expected.keys() | inputs.keys()
        if name not in expected or name not in inputs or not torch.equal(expected[name], inputs[name])
    )
    if different:
        return f"its processor makes something else of an image than the student's ({', '.join(different)} differ)"
    return None
