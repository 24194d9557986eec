"""What processes of tests import before they are forked."""

import accelerate
import transformers
from transformers.models.llama import modeling_llama

import shrank.cli.app
from tests.common import models

__all__ = ["accelerate", "modeling_llama", "models", "shrank", "transformers"]
