//! Who waits for which views; the interleavings are for `tests/handshake_loom.rs` and `tests/handshake_shuttle.rs`.

use futures_util::FutureExt;

use super::retire::Retirements;

#[test]
fn views_are_waited_for_up_to_a_layer() {
    let views = Retirements::default();
    let [low, middle, high] = [0, 1, 2].map(|top| views.add(top));
    for view in [&low, &middle, &high] {
        views.publish(view);
    }
    low.complete();
    assert_eq!(views.all_up_to(0).now_or_never(), Some(()));
    assert_eq!(views.all_up_to(1).now_or_never(), None);
    middle.complete();
    assert_eq!(views.all_up_to(1).now_or_never(), Some(()));
    assert_eq!(views.all_up_to(2).now_or_never(), None);
}

#[test]
fn views_published_before_another_are_waited_for_and_no_others() {
    let views = Retirements::default();
    let [first, second, third, _unpublished] = [0, 0, 0, 0].map(|top| views.add(top));
    for view in [&first, &second, &third] {
        views.publish(view);
    }
    assert_eq!(views.all_before(&first).now_or_never(), Some(()));
    assert_eq!(views.all_before(&second).now_or_never(), None);
    second.complete();
    assert_eq!(views.all_before(&third).now_or_never(), None, "the first is still in use");
    first.complete();
    assert_eq!(views.all_before(&second).now_or_never(), Some(()));
    assert_eq!(views.all_before(&third).now_or_never(), Some(()));
}
