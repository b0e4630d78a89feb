"""Named in Megatron's imports; r1mega has a router of its own."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
