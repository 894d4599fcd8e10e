"""Prompts for text encoders that are language models, which read them as a user's turn in a chat."""

import torch
from transformers import PreTrainedTokenizerBase


class ChatTokenizer:
    """A tokenizer that takes a prompt for a user's turn in a chat, as the pipelines of Qwen3 do.

    Called as a tokenizer is. Of padded `input_ids` the padding is negative, ~id in place of id: the text encoder has to know
    it, and the token that pads may stand in a caption as well. `model_max_length` counts the words around a turn too.
    `enable_thinking` is the pipeline's, of the chat's template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_max_length: int, enable_thinking: bool):
        self.tokenizer, self.model_max_length, self.enable_thinking = tokenizer, model_max_length, enable_thinking

    def __call__(self, prompts: str | list[str], **how):
        one = isinstance(prompts, str)
        turns = [self._turn(prompt) for prompt in ([prompts] if one else prompts)]
        encoded = self.tokenizer(turns[0] if one else turns, **how)
        if how.get("return_tensors") == "pt":
            ids = encoded["input_ids"]
            encoded["input_ids"] = torch.where(encoded["attention_mask"] == 0, ~ids, ids)
        return encoded

    def _turn(self, prompt: str) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.enable_thinking,
        )


def read_ids(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` (B, tokens) of a `ChatTokenizer` as the text encoder takes them, and which are the caption's own, boolean."""
    return torch.where(input_ids < 0, ~input_ids, input_ids), input_ids >= 0
