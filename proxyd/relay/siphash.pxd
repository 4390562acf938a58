# SipHash-1-3 (Aumasson and Bernstein, 2012): a keyed hash, so that nobody outside can choose inputs
# that fall into one bucket.

from proxyd.relay.sys cimport memcpy, uint64_t, uint8_t

ctypedef struct Sip:
    uint64_t v0
    uint64_t v1
    uint64_t v2
    uint64_t v3


cdef inline uint64_t siphash(
    const uint64_t *secret, const void *data, size_t size
) noexcept nogil:
    cdef Sip s
    cdef const uint8_t *at = <const uint8_t *>data
    cdef size_t left = size
    cdef uint64_t word
    s.v0 = secret[0] ^ 0x736f6d6570736575ULL
    s.v1 = secret[1] ^ 0x646f72616e646f6dULL
    s.v2 = secret[0] ^ 0x6c7967656e657261ULL
    s.v3 = secret[1] ^ 0x7465646279746573ULL
    while left >= 8:
        memcpy(&word, at, 8)
        sip_absorb(&s, word)
        at += 8
        left -= 8
    word = 0
    memcpy(&word, at, left)
    sip_absorb(&s, word | <uint64_t>size << 56)
    s.v2 ^= 0xff
    sip_round(&s)
    sip_round(&s)
    sip_round(&s)
    return s.v0 ^ s.v1 ^ s.v2 ^ s.v3


cdef inline void sip_absorb(Sip *s, uint64_t word) noexcept nogil:
    s.v3 ^= word
    sip_round(s)
    s.v0 ^= word


cdef inline void sip_round(Sip *s) noexcept nogil:
    s.v0 += s.v1
    s.v2 += s.v3
    s.v1 = rotate(s.v1, 13) ^ s.v0
    s.v3 = rotate(s.v3, 16) ^ s.v2
    s.v0 = rotate(s.v0, 32)
    s.v2 += s.v1
    s.v0 += s.v3
    s.v1 = rotate(s.v1, 17) ^ s.v2
    s.v3 = rotate(s.v3, 21) ^ s.v0
    s.v2 = rotate(s.v2, 32)


cdef inline uint64_t rotate(uint64_t word, int bits) noexcept nogil:
    return word << bits | word >> (64 - bits)
