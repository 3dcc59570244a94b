-- Applies one sequenced batch of a publisher, with count and digest, or nothing of it.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, sequence, stored hashes, removed hashes (8 bytes each)
-- Returns  {count, digest} of the slot, also for a batch applied before; false if the slot is not this
--          incarnation's or a sequence is missing

local slot, incarnation, sequence, stored, removed = unpack(ARGV)
slot, sequence = tonumber(slot), tonumber(sequence)
local state = own(slot, incarnation)
if not state or sequence > state[2] + 1 then
  return false
end
local count, digest = tonumber(state[3]), state[4]
if sequence <= tonumber(state[2]) then
  return {count, digest}
end

local directory = redis.call('HMGET', DIRECTORY, 'buckets', 'entries')
local num_buckets, num_entries = tonumber(directory[1]), tonumber(directory[2]) or 0
if not num_buckets then
  return false
end
local power = power_within(num_buckets)
local low, high = unpack_from('<I4I4', digest)
local mine = set_of(slot)

local function note(hash, change)
  local hash_low, hash_high = unpack_from('<I4I4', hash)
  low, high = bxor(low, hash_low), bxor(high, hash_high)
  count = count + change
end

-- Few sets occur in a batch, so each is converted once.
local with_slot, without_slot = {}, {}

for at = 1, #stored, 8 do
  local hash = stored:sub(at, at + 7)
  local key = bucket_key(bucket_of(hash, num_buckets, power))
  local set = redis.call('HGET', key, hash) or ''
  with_slot[set] = with_slot[set] or to_set(union(to_words(set), mine))
  if with_slot[set] ~= set then
    redis.call('HSET', key, hash, with_slot[set])
    num_entries = num_entries + (set == '' and 1 or 0)
    note(hash, 1)
  end
end

for at = 1, #removed, 8 do
  local hash = removed:sub(at, at + 7)
  local key = bucket_key(bucket_of(hash, num_buckets, power))
  local set = redis.call('HGET', key, hash) or ''
  without_slot[set] = without_slot[set] or to_set(without(to_words(set), mine))
  if without_slot[set] ~= set then
    if without_slot[set] == '' then
      redis.call('HDEL', key, hash)
      num_entries = num_entries - 1
    else
      redis.call('HSET', key, hash, without_slot[set])
    end
    note(hash, -1)
  end
end

if #removed > 0 then
  redis.call('XADD', REMOVALS, 'MAXLEN', '~', LOG_REMOVALS, '*', 'slot', slot, 'incarnation', incarnation,
    'blocks', removed)
end

local function split_next()
  local source = num_buckets - power
  local stay, move = {}, {}
  local flat = redis.call('HGETALL', bucket_key(source))
  for at = 1, #flat, 2 do
    local moves = unpack_from('<I4', flat[at]) % (2 * power) == num_buckets
    local target = moves and move or stay
    target[#target + 1] = flat[at]
    target[#target + 1] = flat[at + 1]
  end
  write_bucket(source, stay)
  write_bucket(num_buckets, move)
  num_buckets = num_buckets + 1
  power = power_within(num_buckets)
end

-- One split for each bucketful of stores keeps up with any growth; one more catches up.
local num_splits = floor(#stored / 8 / ENTRIES_PER_BUCKET) + 1
while num_splits > 0 and num_entries > ENTRIES_PER_BUCKET * num_buckets do
  split_next()
  num_splits = num_splits - 1
end

digest = pack('<I4I4', low % WORD, high % WORD)
redis.call('HSET', DIRECTORY, 'buckets', num_buckets, 'entries', num_entries)
redis.call('HSET', SLOT .. slot, 'sequence', sequence, 'count', count, 'digest', digest)
return {count, digest}
