"""What student and teacher must agree on: the meaning of every token id the student can emit, of images, and the length."""

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin


def find_unknown_ids(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, eos_token_ids: Collection[int] = ()
) -> list[int]:
    """
    Ids that the student can emit and about which the teacher has nothing to say.

    These are the ids that the teacher's tokenizer doesn't have, the special tokens that it names differently and, if the two end their turns differently (a base
    model with `<|endoftext|>`, say, and an instruct model with `<|im_end|>`), the ids that end the student's turn but
    not the teacher's: the teacher's probability of them is noise. Different sizes of padded vocabularies don't matter.

    Args:
        student ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        teacher ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the teacher.
        eos_token_ids (`Collection[int]`, *optional*):
            Ids that end a completion of the student.

    Returns:
        `list[int]`, sorted.

    Raises:
        `ValueError`: if ordinary ids stand for different tokens, or the teacher doesn't know most of them.
    """
    student_tokens = {id: token for token, id in student.get_vocab().items()}
    teacher_tokens = {id: token for token, id in teacher.get_vocab().items()}
    conflicts = {id for id, token in student_tokens.items() if teacher_tokens.get(id, token) != token}
    unknown = student_tokens.keys() - teacher_tokens.keys()
    # Reserved tokens that one of the two has given a name are no reason to refuse a whole family of models
    unknown |= conflicts & student.added_tokens_decoder.keys() & teacher.added_tokens_decoder.keys()
    conflicts = sorted(conflicts - unknown)
    if conflicts or 2 * len(unknown) > len(student_tokens):
        examples = [
            f"{id}: {student_tokens[id]!r} / {teacher_tokens.get(id)!r}" for id in conflicts or sorted(unknown)
        ]
        raise ValueError(
            f"`teacher_model` reads the student's token ids differently: {len(examples)} ids stand for different tokens "
            f"(id: student's / teacher's - {', '.join(examples[:3])}). RLAD compares the probabilities of the same token "
            "ids, so choose a `teacher_model` that shares the student's tokenizer, saved beside its weights."
        )
    if student.eos_token_id != teacher.eos_token_id:
        unknown |= set(eos_token_ids) - {teacher.eos_token_id}
    return sorted(unknown)


def find_shared_ids(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    unknown_ids: Collection[int],
    eos_token_ids: Collection[int],
) -> list[int]:
    """
    Ids that mean the same to both, which the teacher may name to the student.

    Args:
        student, teacher ([`~transformers.PreTrainedTokenizerBase`]):
            The two tokenizers.
        unknown_ids (`Collection[int]`):
            What [`find_unknown_ids`] found.
        eos_token_ids (`Collection[int]`):
            Ids that end a completion of the student. The teacher isn't to name another one of its own.

    Returns:
        `list[int]`, sorted.
    """
    shared = set(student.get_vocab().values()) & set(teacher.get_vocab().values()) - set(unknown_ids)
    return sorted(shared - ({teacher.eos_token_id} - set(eos_token_ids)))


def longest_prompt(prompts: Sequence[str | list[dict]], tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Number of tokens of about the longest prompt, without what a chat template adds: of those with the most characters.

    Args:
        prompts (`Sequence[str | list[dict]]`):
            Texts or chat messages, of which only the text counts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that measures them.
    """

    def text_of(prompt):
        contents = [prompt] if isinstance(prompt, str) else [message["content"] or "" for message in prompt]
        parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
        return " ".join(part.get("text") or "" for content in parts for part in content)

    texts = sorted(map(text_of, prompts), key=len)[-8:]
    return max(map(len, tokenizer(texts)["input_ids"])) if texts else 0


def find_image_problem(student: ProcessorMixin, teacher: ProcessorMixin) -> str | None:
    """
    Why the teacher can't read the images that the student's processor has prepared, or `None` if it can.

    The teacher is given the student's tensors, among the student's placeholder tokens. So its own processor must make the
    same of an image: its size, patches and normalization, the number of placeholders and their token ids.

    Args:
        student ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        teacher ([`~transformers.ProcessorMixin`]):
            Processor of the teacher.
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
