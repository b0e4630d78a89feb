"""A reward of your own: the shorter the reasoning, the more, for responses of the asked-for form."""

from dataclasses import dataclass

from r1mega.rl.reward.format import split_response


@dataclass(frozen=True)
class Brief:
    half: int = 50  # characters of reasoning that get a half
    value_range = (0.0, 1.0)

    def build(self):
        def score(problem, response):
            parts = split_response(response)  # (reasoning, answer), or None in another form
            return self.half / (self.half + len(parts[0])) if parts else 0.0

        return score
