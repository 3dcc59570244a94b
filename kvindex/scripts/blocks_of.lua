-- Reads the part of a slot's blocks whose hashes have one remainder. Writes nothing.
--
-- The parts are as many as make one 2 or 3 buckets. Their number is a power of two within the number of
-- buckets, so a part is whole buckets: those with the same remainder.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, turn: a number that counts the calls
-- Returns  {part, which is the turn modulo the parts; number of parts; hashes, 8 bytes each}; false if the
--          slot is not this incarnation's

local BUCKETS_PER_PART = 2

local slot, incarnation, turn = unpack(ARGV)
slot = tonumber(slot)
if not own(slot, incarnation) then
  return false
end
local num_buckets = tonumber(redis.call('HGET', DIRECTORY, 'buckets')) or 1
local num_parts = math.max(1, power_within(num_buckets) / BUCKETS_PER_PART)
local part = tonumber(turn) % num_parts
local low, high = slot % 256, floor(slot / 256)
local hashes = {}

-- Whether `set` has the slot; nearly every entry has a set of its own, so none is converted.
local function has_slot(set)
  if #set % 2 == 1 then
    return band(set:byte(floor(slot / 8) + 1) or 0, lshift(1, slot % 8)) ~= 0
  end
  for at = 1, #set, 2 do
    if set:byte(at) == low and set:byte(at + 1) == high then
      return true
    end
  end
  return false
end

for bucket = part, num_buckets - 1, num_parts do
  local flat = redis.call('HGETALL', bucket_key(bucket))
  for at = 1, #flat, 2 do
    if has_slot(flat[at + 1]) and #flat[at] == HASH_BYTES then
      hashes[#hashes + 1] = flat[at]
    end
  end
end
return {part, num_parts, table.concat(hashes)}
