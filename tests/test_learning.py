"""Learning at real hyperparameters, with thresholds far from chance (a random CartPole policy returns about 22)."""

import jax
import jax.numpy as jnp


def test_pqn_solves_cartpole():
    """Ten seeds gave a mean greedy return over the last half of the evaluations of 426 or more."""
    from pqn_cartpole import Config, make_train

    train = make_train(Config(total_timesteps=100_000, eval_interval=4))
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    _, metrics = jax.jit(lambda keys: jax.lax.map(train, keys))(keys)
    returns = metrics["eval/episodic_return"][:, 24:]
    print(jnp.nanmean(returns, axis=1))
    assert (jnp.nanmax(returns, axis=1) > 475).all()
    assert jnp.nanmean(returns) > 300
