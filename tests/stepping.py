"""A step's update alone, as `train_step` makes it."""

from projected_grpo.step import correct_change, write_gradients


def apply_update(exp, state, update):
    before = exp.chat.policy.deltas(ablate_quarantine=True)
    norm = write_gradients(exp, state, update)
    state.optimizer.step()
    return {"gn": norm, **correct_change(exp, state, update, before)}
