// In the place of the toolkit's header, for the host code of an op.
#pragma once

#include "cuda_emulation.h"
