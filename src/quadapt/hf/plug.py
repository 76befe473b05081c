"""What is put around functions of PEFT and transformers, once each of them has been imported: one list of it all.

Neither has a registry for what is done here; lm_eval, the third, has one. Each entry names the function of ours that is
called with the original one and its arguments; it is imported at its first call. So any module of ours can be the first
that a process imports, also those that import PEFT, whose import gets here.
"""

from __future__ import annotations

from quadapt.hooks import wrap


def plug_into_peft() -> None:
    """Give PEFT our layers, our kind of config, and the checks behind its doors."""
    from peft import PeftModel, peft_model
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import hotswap, transformers_weight_conversion

    import quadapt.hf.adapter_config  # noqa: F401 - makes PEFT know our type of config

    wrap(LoraModel, "_create_new_module", "quadapt.hf.tuner:create")
    wrap(BaseTuner, "inject_adapter", "quadapt.hf.tuner:inject")
    wrap(LoraModel, "_unload_and_optionally_merge", "quadapt.hf.tuner:unload")
    wrap(LoraModel, "merge_adapter", "quadapt.hf.tuner:merge")
    wrap(LoraModel, "unmerge_adapter", "quadapt.hf.tuner:unmerge")
    wrap(LoraModel, "_check_add_weighted_adapter", "quadapt.hf.tuner:check_weighted")
    wrap(PeftModel, "load_adapter", "quadapt.hf.doors:load_into_peft_model")
    wrap(peft_model, "set_peft_model_state_dict", "quadapt.hf.doors:set_state")
    wrap(
        transformers_weight_conversion,
        "convert_peft_config_for_transformers",
        "quadapt.hf.expert_adapters:convert_config",
    )
    wrap(
        transformers_weight_conversion,
        "convert_peft_adapter_state_dict_for_transformers",
        "quadapt.hf.expert_adapters:convert_state",
    )
    wrap(hotswap, "check_hotswap_configs_compatible", "quadapt.hf.doors:check_swap")


def plug_into_transformers() -> None:
    """Make transformers know our quantizer, and check what adapters it loads."""
    from transformers import modeling_utils
    from transformers.integrations import peft
    from transformers.integrations.peft import PeftAdapterMixin

    import quadapt.hf.quantizer  # noqa: F401 - registers itself

    wrap(PeftAdapterMixin, "load_adapter", "quadapt.hf.doors:load_into_model")
    wrap(peft, "get_model_conversion_mapping", "quadapt.hf.expert_adapters:mapping_for_adapters")
    wrap(modeling_utils, "remove_tied_weights_from_state_dict", "quadapt.hf.stored_form:without_ties")
    wrap(modeling_utils, "revert_weight_conversion", "quadapt.hf.stored_form:revert")


def plug_into_lm_eval() -> None:
    """Make the harness of EleutherAI know the model `quadapt`, which is loaded as `quadapt.load` does."""
    from lm_eval.api.registry import model_registry

    model_registry.register("quadapt", target="quadapt.harness.lm:QuadaptLM")
