#pragma once

// Set from the CMake project version; the fallback serves editors.
#ifndef FASTLLM_VERSION
#define FASTLLM_VERSION "0.1.0"
#endif
