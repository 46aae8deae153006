// What the shared library shows to its users; everything else stays hidden.
#pragma once

#if defined(__GNUC__)
#define FASTLLM_API __attribute__((visibility("default")))
#else
#define FASTLLM_API
#endif
