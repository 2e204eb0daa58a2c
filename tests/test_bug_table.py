# ruff: noqa: E501  (a table reads better in one line a row)
"""Bugs that GRPO implementations have had, and the test here that would have caught each.

| bug, and where it was seen | test |
|---|---|
| per-microbatch token mean (trl#3021) | test_learner.test_gradient_is_the_same_for_any_split_and_order |
| denominator ignores the truncation mask (trl#6369) | test_learner.test_a_masked_row_changes_neither_numerator_nor_denominator |
| fully masked rows (TRL) | test_learner.test_an_all_masked_update_is_a_finite_zero |
| std near 0 amplified (nemo#4158, verl#6348) | test_losses.test_constant_rewards_give_advantage_exactly_zero |
| std convention | test_losses.test_advantages_by_hand |
| mask off by one | test_batch.test_first_response_token_and_end_of_turn_are_trained_prompt_and_padding_are_not |
| forced EOS on truncation | test_batch.test_a_truncated_row_has_no_gradient_on_a_token_that_was_not_sampled |
| PAD == EOS (trl#7039) | test_batch.test_mask_does_not_come_from_the_padding_id |
| several EOS ids (trl#7039) | test_sampler.test_finish_reason_says_whether_the_model_ended |
| re-tokenising text (cs336#15) | test_grpo.test_token_rows_hold_the_sampled_ids_and_log_probabilities |
| double BOS (trl#3853, vllm#27515) | test_prompts.test_a_base_model_gets_one_bos_and_its_own_end |
| text crosses the boundary (vllm#27515) | test_sampler.test_a_prompt_keeps_the_ids_it_was_rendered_with |
| temperature in log-probs (trl#4159) | test_sampler.test_log_probabilities_are_the_trainers |
| top_p with importance ratios (trl#6789) | test_grpo.test_settings_that_cannot_mean_what_they_say_are_refused |
| group index by text (Search-R1#88) | test_grpo.test_advantages_follow_the_group_whatever_its_prompt |
| stale weights (trl#5312) | test_sampler.test_new_weights_reach_the_sampler_and_carry_their_version |
| low precision (areal#1369) | test_learner.test_tiny_updates_accumulate_in_bfloat16 |
| clip never active | test_grpo.test_the_clip_bites_only_from_the_second_update_on |
| sign of the clip | test_losses.test_clip_cases |
| gradient of the KL term (trl#4967, #6503) | test_losses.test_kl_gradient_is_that_of_the_exact_kl |
| ratio explosion (OpenRLHF#931) | test_losses.test_an_extreme_ratio_stays_finite |
| resume (verl#3457, trl#3247) | test_resume.test_kill_9_and_resume_is_bitwise_the_uninterrupted_run |
| evaluation under the wrong step | test_grpo.test_evaluation_records_carry_the_hash_of_the_weights_of_their_step |
| unparsable gold counted right (open-r1) | test_problems.test_every_fault_names_file_and_line |
"""

from __future__ import annotations

import importlib
import re

import pytest

ROWS = re.findall(r"\| (test_\w+)\.(test_\w+) \|", __doc__ or "")


def test_the_table_has_its_rows():
    assert len(ROWS) == (__doc__ or "").count("\n| ") - 1  # all but the head


@pytest.mark.parametrize(("module", "name"), ROWS)
def test_the_named_test_exists(module, name):
    assert callable(getattr(importlib.import_module(f"tests.{module}"), name))
