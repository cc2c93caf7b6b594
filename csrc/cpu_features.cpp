#include "cpu_features.hpp"

#include <cstring>

#ifdef KVFOLD_X86
#include <cpuid.h>
#endif
#if defined(KVFOLD_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvfold {
namespace {

#ifdef KVFOLD_X86

// The compiler's own list knows that the operating system must keep the registers too.
#define KVFOLD_FEATURE(name) {name, [] { return static_cast<bool>(__builtin_cpu_supports(name)); }}

// Tiles are newer than some compilers' lists, and large: Linux keeps them only for processes that have asked.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}

template <int Bit>
bool tile_feature() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> Bit & 1U) != 0 && tiles_granted();
}

constexpr Feature kFeatures[] = {
    KVFOLD_FEATURE("avx2"),
    KVFOLD_FEATURE("fma"),
    KVFOLD_FEATURE("f16c"),
    KVFOLD_FEATURE("avx512f"),
    KVFOLD_FEATURE("avx512bw"),
    KVFOLD_FEATURE("avx512vl"),
    KVFOLD_FEATURE("avx512dq"),
    KVFOLD_FEATURE("avx512vnni"),
    KVFOLD_FEATURE("avx512bf16"),
    KVFOLD_FEATURE("avx512vbmi"),
    {"amx-tile", tile_feature<24>},
    {"amx-int8", tile_feature<25>},
    {"amx-bf16", tile_feature<22>},
};

#elif defined(__aarch64__)
constexpr Feature kFeatures[] = {{"asimd", [] { return true; }}};  // every 64-bit Arm has it
#else
constexpr Feature kFeatures[] = {{"portable", [] { return true; }}};
#endif

}  // namespace

const Feature* features(size_t* count) {
#ifdef KVFOLD_X86
    __builtin_cpu_init();
#endif
    *count = sizeof kFeatures / sizeof kFeatures[0];
    return kFeatures;
}

bool has_feature(const char* name) {
    size_t count = 0;
    const Feature* known = features(&count);
    for (size_t i = 0; i < count; ++i) {
        if (std::strcmp(known[i].name, name) == 0) return known[i].here();
    }
    return false;
}

}  // namespace kvfold
