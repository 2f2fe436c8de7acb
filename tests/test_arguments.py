import jax
import jax.numpy as jnp
import pytest

from metax.arguments import (
    check_at_least,
    check_count,
    check_number,
    check_one_of,
)


@pytest.mark.parametrize(
    ("bounds", "value", "rule"),
    [
        ({"least": 0}, -1.0, "at least 0"),
        ({"most": 1}, 1.5, "at most 1"),
        ({"above": 0}, 0.0, "above 0"),
        ({"below": 1}, 1.0, "below 1"),
        ({}, float("nan"), "finite"),
        ({}, "1", "a scalar number"),
        ({}, None, "a scalar number"),
        ({}, True, "a scalar number"),
        ({}, jnp.ones(2), "a scalar number"),
    ],
)
def test_a_refused_number_names_argument_rule_and_value(bounds, value, rule):
    with pytest.raises(ValueError, match=rf"`make\(scale=...\)` must be {rule}; got"):
        check_number("make", "scale", value, **bounds)


def test_traced_numbers_pass():
    def double(x):
        check_number("make", "scale", x, above=5)
        return 2 * x

    assert jax.jit(double)(1.0) == 2.0


@pytest.mark.parametrize("value", [0, 1.5, True, "2", None])
def test_what_is_no_integer_large_enough_is_refused(value):
    with pytest.raises(ValueError, match=r"`make\(size=...\)` must be"):
        check_count("make", 1, size=value)


def test_an_unknown_word_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match='must be "a" or "b"; got \'c\''):
        check_one_of("make", "kind", "c", ("a", "b"))


def test_a_least_value_is_itself_refused_where_values_must_be_above_it():
    check_at_least("make", 0, scale=0.0)
    with pytest.raises(ValueError, match=r"scale=...\)` must be above 0; got 0.0"):
        check_at_least("make", 0, below=True, scale=0.0)
    with pytest.raises(ValueError, match=r"scale=...\)` must be at least 0; got"):
        check_at_least("make", 0, scale=-1.0)
    assert jax.jit(lambda x: check_at_least("make", 5, scale=x))(1.0) is None
