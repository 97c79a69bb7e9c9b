// Sums of products of bytes by the processor's matrix tiles (AMX), where there are some.
#pragma once

#include <cstdint>
#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr long kTileTokens = 32, kTileQuads = 16;  // that are multiplied at once

#ifdef __AMX_INT8__
// Whether this process may use tiles; Linux gives them to those who ask.
inline bool has_tiles() {
    constexpr long kAskForPermission = 0x1023, kTileData = 18;
    static const bool may = syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
    return may;
}

// Eight tiles of 16 rows of 64 bytes, for this thread.
inline void configure_tiles() {
    alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // compilers think that only a part of it is read
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }

// out, (32, ld), = products of 32 tokens, `room` bytes apart, with `panels` panels over their first `quads` fours of
// inputs, a multiple of kTileQuads.
inline void multiply_tiles(const uint8_t* w, long panel_bytes, long panels, const int8_t* tokens, long room, long quads,
                           int32_t* out, long ld) {
    asm volatile("" : : : "memory");  // they do not know that tiles are loaded from memory
    for (long p = 0; p < panels; p += 2) {
        const uint8_t *left = w + p * panel_bytes, *right = p + 1 < panels ? left + panel_bytes : left;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long k = 0; k < quads; k += kTileQuads) {
            _tile_loadd(4, tokens + k * 4, room);
            _tile_loadd(6, left + k * 64, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(5, tokens + 16 * room + k * 4, room);
            _tile_dpbsud(1, 5, 6);
            _tile_loadd(7, right + k * 64, 64);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
        int32_t* sums = out + p * 16;
        _tile_stored(0, sums, ld * 4);
        _tile_stored(1, sums + 16 * ld, ld * 4);
        if (p + 1 == panels) continue;
        _tile_stored(2, sums + 16, ld * 4);
        _tile_stored(3, sums + 16 * ld + 16, ld * 4);
    }
}
#else
inline bool has_tiles() { return false; }
inline void configure_tiles() {}
inline void release_tiles() {}
inline void multiply_tiles(const uint8_t*, long, long, const int8_t*, long, long, int32_t*, long) {}
#endif

}  // namespace
