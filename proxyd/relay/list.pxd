# Doubly linked lists whose links are part of what they link.
#
# A list is a Link that stands for both ends; a link that is in no list points to itself, so that
# removing it twice does nothing.

from proxyd.relay.types cimport Link


cdef inline void list_append(Link *head, Link *link) noexcept nogil:
    link.prev = head.prev
    link.next = head
    head.prev.next = link
    head.prev = link


cdef inline void list_insert_after(Link *place, Link *link) noexcept nogil:
    link.prev = place
    link.next = place.next
    place.next.prev = link
    place.next = link


cdef inline void list_remove(Link *link) noexcept nogil:
    link.prev.next = link.next
    link.next.prev = link.prev
    link.prev = link.next = link


cdef inline void list_move_all(Link *head, Link *source) noexcept nogil:
    """Append all of `source`, which is empty then."""
    if list_empty(source):
        return
    source.next.prev = head.prev
    source.prev.next = head
    head.prev.next = source.next
    head.prev = source.prev
    source.prev = source.next = source


cdef inline bint list_empty(const Link *head) noexcept nogil:
    return head.next == head


cdef inline void link_init(Link *link, void *owner) noexcept nogil:
    link.prev = link.next = link
    link.owner = owner
