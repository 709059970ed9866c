"""What PQN for continuous actions alone has: SARSA on noisy actions, critics, a penalised actor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SCRIPTS
from test_pql import Count
from test_train import assert_equal

import pqn_continuous_action as pqn

TINY = pqn.Config(**SCRIPTS["pqn_continuous_action"] | {"eval_interval": 0})


def huber(errors):
    return np.where(np.abs(errors) < 1, 0.5 * errors**2, np.abs(errors) - 0.5)


def test_proximity_penalty():
    """Written out for each action; the threshold is on the mean, not on a component."""
    old = np.full((4, 2), 0.1, np.float32)
    change = np.array([[0.1, 0.1], [0.0, 0.5], [-0.6, 0.0], [1.5, -0.5]], np.float32)
    expected = [0, 0, 10 * huber(0.6) / 2, 10 * (huber(1.5) + huber(0.5)) / 2]
    penalty = pqn.proximity_penalty(jnp.array(old + change), jnp.array(old), 0.26, 10.0)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def watch(monkeypatch):
    """Lists that fill, as a program runs, with its steps and the arguments of lambda_returns."""
    steps, arguments = [], []
    step_envs, lambda_returns = pqn.step_envs, pqn.lambda_returns

    def watched_step(*args):
        after, step, sums = step_envs(*args)
        jax.debug.callback(steps.append, step, ordered=True)
        return after, step, sums

    def watched_returns(*args):
        jax.debug.callback(lambda *x: arguments.append(x), *args, ordered=True)
        return lambda_returns(*args)

    monkeypatch.setattr(pqn, "step_envs", watched_step)
    monkeypatch.setattr(pqn, "lambda_returns", watched_returns)
    return steps, arguments


@pytest.mark.parametrize("bootstrap", [True, False])
def test_an_update_made_again(bootstrap, monkeypatch):
    """From the steps that were taken: the inputs of the targets, and one gradient step of all."""
    steps, arguments = watch(monkeypatch)
    sizes = {"num_envs": 16, "num_epochs": 1, "num_minibatches": 1, "total_timesteps": 16 * 8}
    settings = {"env_id": Count.__name__, "num_critics": 3}
    settings |= {"learning_rate": 0.1, "max_grad_norm": 0.1, "reward_scale": 0.5}
    settings |= {"stddev_start": 0.2, "norm_reward": True, "obs_clip": 1.2}
    config = dataclasses.replace(TINY, **sizes, **settings, bootstrap_on_truncation=bootstrap)
    train = pqn.make_train(config)
    statistics = pqn.Statistics(jnp.array([2.0, 0.5]), jnp.array([2.0, 0.3]), jnp.float32(100))
    before = jax.jit(train.init)(jax.random.key(0))._replace(statistics=statistics)
    jax.effects_barrier()
    steps.clear()  # those of init
    after, metrics = jax.block_until_ready(jax.jit(lambda state: train(state=state))(before))
    jax.effects_barrier()
    rows = jax.tree.map(lambda *x: np.stack(x), *steps)
    rewards, next_values, terminated, truncated, *_ = arguments[0]
    actor, critics = pqn.DeterministicPolicy(1, config), pqn.Critics(config)
    networks = before.networks
    mean, stddev = np.array([2.0, 0.5]), np.sqrt(np.array([2.0, 0.3]) + 1e-8)
    obs, next_obs = (jnp.clip((x - mean) / stddev, -1.2, 1.2) for x in (rows.obs, rows.next_obs))

    def value(obs, action):
        return critics.apply(networks["critics"], obs, action).mean(axis=0)

    running, sums = np.zeros(16), []
    for reward, end in zip(rows.reward, rows.terminated | rows.truncated, strict=True):
        running = config.gamma * running + reward
        sums.append(running)
        running = np.where(end, 0, running)
    np.testing.assert_allclose(after.return_statistics.var, np.var(sums), rtol=1e-4)
    seen = rows.obs.reshape(-1, 2)
    assert after.statistics.count == 100 + len(seen)
    expected = (100 * mean + seen.sum(axis=0)) / (100 + len(seen))
    np.testing.assert_allclose(after.statistics.mean, expected, rtol=1e-4)
    scale = 0.5 / np.sqrt(after.return_statistics.var)
    np.testing.assert_allclose(rewards, scale * rows.reward, rtol=1e-5)
    np.testing.assert_array_equal(truncated, rows.truncated)
    np.testing.assert_array_equal(terminated, rows.terminated | (~bootstrap & rows.truncated))
    assert rows.terminated.any() and rows.truncated.any()
    noise = rows.action - actor.apply(networks["actor"], obs)
    assert 0.15 < noise.std() < 0.25 and abs(noise.mean()) < 0.1 and np.abs(rows.action).max() <= 1
    # Next values: of the action that was taken next or, after an end, of a noisy one there.
    ended = rows.terminated | rows.truncated
    goes_on, taken = ~ended[:-1], value(obs, rows.action)[1:]
    np.testing.assert_allclose(next_values[:-1][goes_on], taken[goes_on], atol=1e-5)
    ended[-1] = True
    greedy = actor.apply(networks["actor"], next_obs)
    actions = jnp.clip(greedy + np.linspace(-1, 1, 51)[:, None, None, None], -1, 1)
    near = jax.vmap(value, (None, 0))(next_obs, actions)
    assert (near.min(0) <= next_values + 1e-5)[ended].all()
    assert (near.max(0) >= next_values - 1e-5)[ended].all()
    assert (np.abs(next_values - value(next_obs, greedy))[ended] > 1e-3).mean() > 0.9

    def td_loss(params):
        errors = critics.apply(params, obs, rows.action) - pqn.lambda_returns(*arguments[0])
        losses = jnp.where(jnp.abs(errors) < 1, errors**2 / 2, jnp.abs(errors) - 0.5)
        return losses.mean(axis=(1, 2)).sum()

    def policy_loss(params):
        return -value(obs, actor.apply(params, obs)).mean()

    for name, label, loss in [("critics", "td", td_loss), ("actor", "policy", policy_loss)]:
        expected, grads = jax.value_and_grad(loss)(networks[name])
        np.testing.assert_allclose(metrics[f"losses/{label}_loss"], expected, rtol=1e-4)
        norm = np.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(grads)))
        # RAdam's first step is along the gradient; each of the two has its own norm to clip.
        assert norm > 0.1
        step = jax.tree.map(lambda grad, norm=norm: 0.1 * 0.1 / norm * grad, grads)
        stepped = jax.tree.map(jnp.subtract, networks[name], step)
        assert_equal(after.networks[name], stepped, atol=1e-5)
    assert metrics["losses/penalty"][0] < 1e-9  # the actions are the old ones, without their noise


def test_penalty_holds_the_policy():
    """Where it is on, the actions of an update stay near; its ratio counts who was penalised."""
    settings = {"num_envs": 16, "total_timesteps": 8 * 16, "num_epochs": 8, "learning_rate": 0.1}
    config = dataclasses.replace(TINY, **settings, anneal_lr=False)

    def change(threshold, coef):
        mine = dataclasses.replace(config, penalty_threshold=threshold, penalty_coef=coef)
        train = pqn.make_train(mine)
        before = train.init(jax.random.key(0))
        after, metrics = train(state=before)
        actor, obs = pqn.DeterministicPolicy(1, mine), before.env.obs
        actions = [actor.apply(state.networks["actor"], obs) for state in (before, after)]
        return jnp.abs(actions[1] - actions[0]).mean(), metrics["losses/penalty_ratio"][0]

    cases = jnp.array([0.0, 0.05, 0.05, 10.0]), jnp.array([1000.0, 1000.0, 0.0, 1000.0])
    changes, ratios = jax.jit(jax.vmap(change))(*cases)
    np.testing.assert_array_equal(ratios[2:], 0)
    assert 0 < ratios[1] < ratios[0] and changes[0] < changes[1] < 0.1 < changes[2]
    np.testing.assert_allclose(changes[3], changes[2], rtol=1e-4)


def test_evaluation_does_not_explore():
    sizes = {"env_id": Count.__name__, "learning_rate": 0.0, "eval_interval": 1}

    def returns(stddev):
        config = dataclasses.replace(TINY, **sizes, stddev_start=stddev)
        metrics = pqn.make_train(config)(jax.random.key(0), num_updates=2)[1]
        return metrics["eval/episodic_return"], metrics["charts/episodic_return"]

    evaluated, training = jax.jit(jax.vmap(returns))(jnp.array([0.1, 1.0]))
    np.testing.assert_allclose(*evaluated, rtol=1e-5)
    assert (np.abs(training[0] - training[1]) > 0.01).all()


def test_noise_decays_to_its_last_value():
    """Linearly over half of the run, and it stays there after the end."""
    config = dataclasses.replace(TINY, stddev_start=0.8, stddev_finish=0.2, stddev_decay=0.5)

    def stddev(number):
        train = pqn.make_train(config)
        state = train.init(jax.random.key(0))._replace(update=number)
        return train(state=state, num_updates=1)[1]["charts/stddev"][0]

    numbers = jnp.array([0, 3, 6, 11, 12, 100])
    stddevs = jax.jit(jax.vmap(stddev))(numbers)
    np.testing.assert_allclose(stddevs, [0.8, 0.5, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)


def test_networks():
    """Layer norm after each hidden layer or none, and as many critics as asked for, all unlike."""
    for norm, num_critics in (("layer_norm", 2), ("none", 1)):
        config = dataclasses.replace(TINY, norm=norm, num_critics=num_critics)
        params = pqn.Critics(config).init(jax.random.key(0), jnp.ones((4, 3)), jnp.ones((4, 1)))
        values = pqn.Critics(config).apply(params, jnp.ones((4, 3)), jnp.ones((4, 1)))
        assert values.shape == (num_critics, 4) and len(np.unique(values[:, 0])) == num_critics
        layers = params["params"]["MLP"]
        assert ("LayerNorm_0" in layers) == (norm == "layer_norm")
        for kernel in layers["Dense_0"]["kernel"]:
            gram = kernel @ kernel.T
            np.testing.assert_allclose(gram, jnp.eye(len(gram)), atol=1e-5)
