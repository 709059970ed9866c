"""The numbered equations, against slow and obvious NumPy."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, one_with, only
from hypothesis import given, settings
from hypothesis import strategies as st


def slow_lambda_returns(rewards, next_values, terminated, truncated, gamma, td_lambda):
    """The mixture of n-step returns that the lambda-return is, written out for every step."""
    num_steps, num_envs = rewards.shape
    returns = np.zeros((num_steps, num_envs))
    for env in range(num_envs):
        for t in range(num_steps):
            n_step_returns, total, discount = [], 0.0, 1.0
            for k in range(t, num_steps):
                total += discount * rewards[k, env]
                discount *= gamma
                value = 0.0 if terminated[k, env] else next_values[k, env]
                n_step_returns.append(total + discount * value)
                if terminated[k, env] or truncated[k, env]:
                    break
            last = n_step_returns.pop()
            weights = [(1 - td_lambda) * td_lambda**n for n in range(len(n_step_returns))]
            mixed = sum(
                weight * value for weight, value in zip(weights, n_step_returns, strict=True)
            )
            returns[t, env] = mixed + td_lambda ** len(n_step_returns) * last
    return returns


def slow_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """The sum of discounted one-step errors to the end of the episode or rollout, written out."""
    num_steps, num_envs = rewards.shape
    advantages = np.zeros((num_steps, num_envs))
    for env in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                next_value = 0.0 if terminated[k, env] else next_values[k, env]
                error = rewards[k, env] + gamma * next_value - values[k, env]
                advantages[t, env] += (gamma * gae_lambda) ** (k - t) * error
                if terminated[k, env] or truncated[k, env]:
                    break
    return advantages


# Every new shape is a compilation: few shapes, many values.
SHAPES = st.sampled_from([(1, 1), (2, 3), (12, 2)])
ROLLOUTS = given(
    shape=SHAPES,
    seed=st.integers(0, 2**32 - 1),
    ends=st.sampled_from([0.0, 0.1, 0.5]),
    gamma=st.floats(0, 1),
    trace=st.floats(0, 1),
)
MANY = settings(max_examples=150, deadline=None)


@one_with("lambda_returns")
@MANY
@ROLLOUTS
def test_lambda_returns(script, shape, seed, ends, gamma, trace):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, *shape)).astype(np.float32)
    terminated, truncated = rng.random((2, *shape)) < ends  # at times both at once
    arguments = rewards, next_values, terminated, truncated, gamma, trace
    np.testing.assert_allclose(
        jax.jit(script.lambda_returns)(*map(jnp.asarray, arguments)),
        slow_lambda_returns(*arguments),
        atol=1e-4,
    )


@one_with("gae")
@MANY
@ROLLOUTS
def test_gae(script, shape, seed, ends, gamma, trace):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, *shape)).astype(np.float32)
    terminated, truncated = rng.random((2, *shape)) < ends
    arguments = rewards, values, next_values, terminated, truncated, gamma, trace
    np.testing.assert_allclose(
        jax.jit(script.gae)(*map(jnp.asarray, arguments)), slow_gae(*arguments), atol=1e-4
    )


@one_with("gae")
def test_gae_against_rlax(script):
    rlax = pytest.importorskip("rlax")
    rewards, values = jax.random.normal(jax.random.key(0), (2, 20, 3))
    last = jax.random.normal(jax.random.key(2), (1, 3))
    terminated = jax.random.bernoulli(jax.random.key(1), 0.2, (20, 3))
    all_values = jnp.concatenate([values, last])
    ours = script.gae(
        rewards, values, all_values[1:], terminated, jnp.zeros_like(terminated), 0.9, 0.7
    )
    theirs = jax.vmap(
        rlax.truncated_generalized_advantage_estimation, in_axes=(1, 1, None, 1), out_axes=1
    )
    np.testing.assert_allclose(ours, theirs(rewards, 0.9 * ~terminated, 0.7, all_values), atol=1e-5)


@one_with("clipped_surrogate", "value_loss")
def test_clipped_losses(script):
    rng = np.random.default_rng(0)
    ratios, advantages = (
        rng.uniform(0.5, 1.5, 50).astype(np.float32),
        rng.normal(size=50).astype(np.float32),
    )
    expected = -np.mean(
        [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages, strict=True)]
    )
    np.testing.assert_allclose(
        script.clipped_surrogate(ratios, advantages, 0.2), expected, atol=1e-6
    )
    values, old_values, returns = rng.normal(size=(3, 50)).astype(np.float32)
    errors = [
        max((v - g) ** 2, (o + min(max(v - o, -0.2), 0.2) - g) ** 2)
        for v, o, g in zip(values, old_values, returns, strict=True)
    ]
    np.testing.assert_allclose(
        script.value_loss(values, old_values, returns, 0.2), 0.5 * np.mean(errors), rtol=1e-5
    )


@one_with("gaussian_log_prob", "gaussian_entropy")
def test_gaussian(script):
    """Against the density, written out, and the entropy as the mean of -log p over many samples."""
    rng = np.random.default_rng(0)
    action, mean = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    std = np.array([0.2, 1.0, 3.0], np.float32)
    distances = (action.astype(np.float64) - mean) / std
    densities = np.exp(-(distances**2) / 2) / np.sqrt(2 * np.pi * std**2)
    ours = script.gaussian_log_prob(action, mean, jnp.log(std))
    np.testing.assert_allclose(ours, np.log(densities.prod(-1)), rtol=1e-4)
    samples = mean[0, 0] + std * rng.normal(size=(200_000, 3)).astype(np.float32)
    log_probs = script.gaussian_log_prob(samples, mean[0, 0], jnp.log(std))
    np.testing.assert_allclose(script.gaussian_entropy(jnp.log(std)), -log_probs.mean(), atol=0.01)


@one_with("td_targets")
def test_td_targets(script):
    targets = script.td_targets(
        jnp.array([1.0, 1.0, -2.0]),
        jnp.array([10.0, 10.0, 5.0]),
        jnp.array([False, True, False]),
        0.9,
    )
    np.testing.assert_allclose(targets, [10.0, 1.0, 2.5])


@one_with("replay_insert", "replay_sample")
@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("num_rows, num_envs", [(1, 1), (4, 3)])
def test_replay_is_a_deque(script, vmapped, num_rows, num_envs):
    """After every insert, sampling everything gives what a deque holds."""

    def row(number):  # every entry of every field tells the number and the environment
        label = 10.0 * number + jnp.arange(num_envs)
        obs = jnp.stack([label, -label], axis=-1)
        return script.Transition(obs, label.astype(jnp.int32), label, label % 2 > 0, obs + 0.5)

    insert, sample = script.replay_insert, script.replay_sample
    replay = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape), x.dtype), row(0))
    if vmapped:
        replay = jax.tree.map(lambda x: jnp.stack([x, x]), replay)
        insert = jax.vmap(insert, in_axes=(0, None, None))
        sample = jax.vmap(sample, in_axes=(0, None, None))
    insert, sample = jax.jit(insert), jax.jit(sample)
    model = deque(maxlen=num_rows)
    for number in range(3 * num_rows + 2):
        replay = insert(replay, number, row(number))
        model.append(row(number))
        num_filled = len(model) * num_envs
        # Any bits with the same remainder pick the same transition.
        bits = jnp.arange(num_rows * num_envs, dtype=jnp.uint32) + jnp.uint32(7 * num_filled)
        batch = sample(replay, bits, jnp.int32(len(model)))
        for one in (
            [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(2)] if vmapped else [batch]
        ):
            order = np.argsort(one.reward[:num_filled])
            for field, *expected in zip(one, *model, strict=True):
                ours = np.asarray(field)[:num_filled][order]
                np.testing.assert_array_equal(ours, np.concatenate(expected))


@one_with("replay_sample")
def test_replay_samples_uniformly(script):
    labels = jnp.arange(12.0).reshape(4, 3)
    replay = script.Transition(labels, labels.astype(jnp.int32), labels, labels > 0, labels)
    batch = script.replay_sample(
        replay, jax.random.bits(jax.random.key(0), (60_000,)), jnp.int32(3)
    )
    counts = np.bincount(batch.action, minlength=12)
    assert (counts[9:] == 0).all()
    np.testing.assert_allclose(counts[:9] / 60_000, 1 / 9, atol=0.01)


def slow_n_step(rewards, next_obs, terminated, truncated, gamma, n):
    """Window by window, step by step, to the n-th step or the end of the episode."""
    num_windows, num_envs = len(rewards) - n + 1, rewards.shape[1]
    total, discount = np.zeros((2, num_windows, num_envs))
    last_obs = np.zeros((num_windows, *next_obs.shape[1:]))
    for env in range(num_envs):
        for t in range(num_windows):
            for k in range(t, t + n):
                total[t, env] += gamma ** (k - t) * rewards[k, env]
                if terminated[k, env] or truncated[k, env]:
                    break
            discount[t, env] = 0 if terminated[k, env] else gamma ** (k - t + 1)
            last_obs[t, env] = next_obs[k, env]
    return total, discount, last_obs


@one_with("n_step_transitions")
@MANY
@given(
    sizes=st.sampled_from([(1, 3, 2), (3, 1, 1), (3, 8, 2), (5, 4, 3)]),
    seed=st.integers(0, 2**32 - 1),
    ends=st.sampled_from([0.0, 0.1, 0.5]),
    gamma=st.floats(0, 1),
)
def test_n_step_transitions(script, sizes, seed, ends, gamma):
    n, num_windows, num_envs = sizes
    rng, num_steps = np.random.default_rng(seed), num_windows + n - 1
    rewards = rng.normal(size=(num_steps, num_envs)).astype(np.float32)
    next_obs = rng.normal(size=(num_steps, num_envs, 2)).astype(np.float32)
    terminated, truncated = rng.random((2, num_steps, num_envs)) < ends  # at times both at once
    arguments = rewards, next_obs, terminated, truncated
    function = jax.jit(script.n_step_transitions, static_argnums=5)
    ours = function(*map(jnp.asarray, arguments), gamma, n)
    for mine, slow in zip(ours, slow_n_step(*arguments, gamma, n), strict=True):
        np.testing.assert_allclose(mine, slow, atol=1e-5)


@one_with("mixed_exploration_stddevs")
@given(num_envs=st.sampled_from([1, 2, 50]), low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_mixed_exploration_stddevs(script, num_envs, low, high):
    slow = [
        low + (i - 1) / (num_envs - 1) * (high - low) if num_envs > 1 else low
        for i in range(1, num_envs + 1)
    ]
    np.testing.assert_allclose(
        script.mixed_exploration_stddevs(num_envs, low, high), slow, atol=1e-6
    )


@one_with("double_q_targets")
def test_double_q_targets(script):
    values = jnp.array([[10.0, 1.0, 5.0], [4.0, 2.0, -5.0]])
    targets = script.double_q_targets(
        jnp.array([1.0, 1.0, -2.0]), values, jnp.array([0.5, 0.0, 0.9])
    )
    np.testing.assert_allclose(targets, [3.0, 1.0, -6.5])


@one_with("project_distribution")
@MANY
@given(
    sizes=st.sampled_from([(2, 1), (3, 4), (20, 2)]),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_project_distribution(script, sizes, seed, scale):
    num_atoms, batch = sizes
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(num_atoms), size=(2, batch))
    rewards, discounts = (
        scale * rng.normal(size=batch),
        rng.random(batch) * (rng.random(batch) < 0.7),
    )
    support = np.linspace(-2, 3, num_atoms)
    expected, gap = np.zeros(probs.shape), support[1] - support[0]
    for critic, row, atom in np.ndindex(probs.shape):
        at = (min(max(rewards[row] + discounts[row] * support[atom], -2), 3) - support[0]) / gap
        low = min(int(at), num_atoms - 2)
        expected[critic, row, low] += (1 - (at - low)) * probs[critic, row, atom]
        expected[critic, row, low + 1] += (at - low) * probs[critic, row, atom]
    arguments = [jnp.asarray(x, jnp.float32) for x in (probs, rewards, discounts, support)]
    np.testing.assert_allclose(
        jax.jit(script.project_distribution)(*arguments), expected, atol=2e-5
    )


@one_with("project_distribution")
def test_project_distribution_against_rlax(script):
    rlax = pytest.importorskip("rlax")
    support = jnp.linspace(-10, 10, 51)
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (7, 51)))
    rewards, discounts = jax.random.normal(jax.random.key(1), (2, 7))
    ours = script.project_distribution(probs, rewards, discounts, support)
    values = rewards[:, None] + discounts[:, None] * support
    theirs = jax.vmap(rlax.categorical_l2_project, in_axes=(0, 0, None))(values, probs, support)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@one_with("binary_cross_entropy")
def test_binary_cross_entropy(script):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 4)), rng.random((5, 4)) / 4
    expected = 0
    for critic, row, atom in np.ndindex(logits.shape):
        prob = np.exp(logits[critic, row, atom]) / np.exp(logits[critic, row]).sum()
        target = targets[row, atom]
        expected -= (target * np.log(prob) + (1 - target) * np.log(1 - prob)) / (5 * 4)
    loss = script.binary_cross_entropy(jnp.float32(logits), jnp.float32(targets))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@one_with("squashed_gaussian")
def test_squashed_gaussian(script):
    """The density of tanh of a Gaussian, by a change of variables; no overflow far out."""
    mean, log_std, noise = np.random.default_rng(0).normal(size=(3, 50, 2))
    log_std[0] = 9, -9  # clipped to 5 and -5
    noise[0] = 0.01, 0.5
    outputs = np.concatenate([mean, log_std], axis=-1)
    action, log_prob = script.squashed_gaussian(jnp.float32(outputs), jnp.float32(noise))
    std = np.exp(np.clip(log_std, -5, 5))
    x = mean + std * noise
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / np.sqrt(2 * np.pi * std**2)
    expected = np.log(density / (1 - np.tanh(x) ** 2)).sum(axis=-1)
    np.testing.assert_allclose(action, np.tanh(x), atol=1e-6)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-3, atol=1e-4)
    far, log_prob = script.squashed_gaussian(jnp.array([30.0, 0.0]), jnp.array([0.0]))
    assert far == 1 and np.isclose(log_prob, -np.log(2 * np.pi) / 2 - 2 * np.log(2) + 60)


@only("normalize")
def test_normalize(script):
    """Small variances tell which number each script's reference adds to them."""
    added = 1e-4 if script.__name__ == "pql_isaac_style" else 1e-8
    var = np.array([1e-6, 1e-4, 1, 1e4], np.float32)
    statistics = script.Statistics(jnp.arange(4.0), jnp.array(var), jnp.float32(9))
    obs = jnp.arange(4.0) + 2 * jnp.sqrt(var)
    expected = 2 * np.sqrt(var / (var + added))
    np.testing.assert_allclose(script.normalize(obs, statistics), expected, rtol=1e-3)
    np.testing.assert_allclose(script.normalize(obs, statistics, 0.1), 0.1)


@one_with("update_statistics", "normalize")
@given(
    sizes=st.sampled_from([(1, 1), (6, 1), (3, 9)]),
    seed=st.integers(0, 2**32 - 1),
    offset=st.floats(-10, 10),
)
@settings(max_examples=80, deadline=None)
def test_running_statistics(script, sizes, seed, offset):
    batches, batch = sizes
    data = (
        np.random.default_rng(seed).normal(size=(batches, batch, 3)) * [0.1, 1, 5] + offset
    ).astype(np.float32)
    statistics = script.Statistics(jnp.zeros(3), jnp.ones(3), jnp.float32(0))
    for part in data:
        statistics = script.update_statistics(statistics, jnp.asarray(part))
    every = data.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, every.mean(0), atol=1e-4)
    np.testing.assert_allclose(statistics.var, every.var(0), rtol=1e-3, atol=1e-4)
    assert statistics.count == batches * batch


@one_with("lambda_returns")
def test_lambda_returns_against_rlax(script):
    rlax = pytest.importorskip("rlax")
    rewards, next_values = jax.random.normal(jax.random.key(0), (2, 20, 3))
    terminated = jax.random.bernoulli(jax.random.key(1), 0.2, (20, 3))
    ours = script.lambda_returns(
        rewards, next_values, terminated, jnp.zeros_like(terminated), 0.9, 0.7
    )
    theirs = jax.vmap(rlax.lambda_returns, in_axes=(1, 1, 1, None), out_axes=1)
    np.testing.assert_allclose(
        ours, theirs(rewards, 0.9 * ~terminated, next_values, 0.7), atol=1e-5
    )


@one_with("epsilon_greedy")
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(60_000,), (30, 2_000)])
def test_epsilon_greedy_frequencies(script, epsilon, shape):
    q_values = jnp.broadcast_to(jnp.array([0.0, 2.0, 1.0]), (*shape, 3))
    actions = script.epsilon_greedy(jax.random.key(0), q_values, epsilon)
    assert actions.shape == shape and actions.dtype == jnp.int32
    frequencies = np.bincount(actions.ravel(), minlength=3) / actions.size
    np.testing.assert_allclose(
        frequencies, [epsilon / 3, 1 - epsilon * 2 / 3, epsilon / 3], atol=0.01
    )


@one_with("epsilon_greedy")
def test_epsilon_greedy_is_greedy_for_each_row(script):
    q_values = jax.random.normal(jax.random.key(0), (5, 7, 4))
    np.testing.assert_array_equal(
        script.epsilon_greedy(jax.random.key(1), q_values, 0.0), q_values.argmax(-1)
    )


def test_every_script_is_tested():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS) | {"pqn_atari"}


@one_with("scan_packed")
def test_packed_scan_equals_scan(script, monkeypatch):
    """Arrays of all types and sizes come through unchanged, also those that are not packed."""

    def step(carry, key):
        number = carry["int"].sum() + 1
        floats = jnp.array([-0.0, 1e-40, jnp.nan, jnp.inf, -1.5], jnp.float32)
        after = {
            "float": jnp.roll(carry["float"], 1, axis=1),
            "int": carry["int"] - number,
            "large": carry["large"] + 1,
            "half": carry["half"] * 2,
            "byte": carry["byte"] + jnp.uint8(100),
            "empty": carry["empty"],
            "key": jax.vmap(jax.random.split)(carry["key"])[:, 0],
        }
        output = {"end": after["int"] % 2 == 0, "none": (), "before": carry, "same": floats[:3]}
        return after, output | {"bits": jax.random.bits(key, (3,), jnp.uint32)}

    carry = {
        "float": jnp.tile(jnp.array([-0.0, 1e-40, jnp.nan, jnp.inf, -1.5], jnp.float32), (3, 1)),
        "int": jnp.array([[[2**31 - 1]], [[-5]], [[0]]], jnp.int32),
        "large": jnp.arange(3 * 1000.0).reshape(3, 1000),
        "half": jnp.ones((3, 2), jnp.bfloat16),
        "byte": jnp.ones((3,), jnp.uint8),
        "empty": jnp.ones((3, 0)),
        "key": jax.random.split(jax.random.key(0), 3),
    }
    keys = jax.random.split(jax.random.key(1), 4)
    expected = script.scan_packed(step, carry, keys)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    first = script.scan_packed(step, carry, keys)
    together = jax.vmap(lambda keys: script.scan_packed(step, carry, keys))(jnp.stack([keys] * 2))
    for other in (first, jax.tree.map(lambda x: x[1], together)):
        assert jax.tree.structure(other) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
