"""Identity codes: what they are, how code vectors become them, and how good they are."""

from gif.codes.advise import CodeShape, advise
from gif.codes.config import TokenizeConfig
from gif.codes.identity_codes import IdentityCodes, code_length
from gif.codes.quality import CodeQuality, judge_codes, linear_probe, token_entropy
from gif.codes.tokenize import tokenize

__all__ = [
    "CodeQuality",
    "CodeShape",
    "IdentityCodes",
    "TokenizeConfig",
    "advise",
    "code_length",
    "judge_codes",
    "linear_probe",
    "token_entropy",
    "tokenize",
]
